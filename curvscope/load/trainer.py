"""What the Hugging Face Trainer leaves in a checkpoint's folder: optimizer, scheduler, its state and its arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from curvscope.errors import CheckpointError
from curvscope.load.optimizer import is_optimizer_state
from curvscope.load.pickled import load_pickled
from curvscope.load.problem import OptimizerState, Schedule
from curvscope.load.schedule import run_ahead
from curvscope.load.surroundings import find_clip, with_surroundings

ARGUMENTS = "training_args.bin"


def trainer_state(folder: Path, *, trust: bool) -> tuple[Mapping[str, Any] | None, int | None, tuple[str, ...]]:
    """The state_dict in the Trainer's optimizer.pt, the step of its trainer_state.json, and notes."""
    step = _state(folder).get("global_step")
    step = step if isinstance(step, int) and not isinstance(step, bool) else None
    path = folder / "optimizer.pt"
    if not path.is_file():
        return None, step, ()
    try:
        content = load_pickled(path, trust=trust)
    except CheckpointError as cause:
        return None, step, (f"The Trainer's optimizer.pt was left out: {cause.what}",)
    if not is_optimizer_state(content):
        return None, step, ("The Trainer's optimizer.pt holds no optimizer state and was left out.",)
    return content, step, ()


def with_trainer(state: OptimizerState | None, folder: Path, *, trust: bool) -> OptimizerState | None:
    """The optimizer's state with the Trainer's schedule and its bound on the gradient's norm.

    The bound, and the function behind the usual schedules, are in training_args.bin, a pickle that is read with `trust`
    only. Without it a schedule by a function is told from the log: rising towards its base rate, or past it.
    """
    if state is None:
        return None
    found: dict[str, Any] = {}
    for key, name in (("scheduler", "scheduler.pt"), ("args", ARGUMENTS)):
        # what can't be read here is only missed, never needed
        if (folder / name).is_file() and (trust or key == "scheduler"):
            with contextlib.suppress(CheckpointError):
                found[key] = load_pickled(folder / name, trust=trust)
    result = with_surroundings(state, found)
    assert result is not None
    record = _state(folder)
    ahead = result.schedule
    if ahead is not None and ahead.name == "LambdaLR":
        groups = state.state_dict["param_groups"]
        exact = _by_arguments(found["args"], record, found["scheduler"], groups) if "args" in found else None
        result = dataclasses.replace(result, schedule=exact or _by_log(ahead, record))
    if "args" not in found and (folder / ARGUMENTS).is_file():
        note = (
            f"The Trainer's bound on the gradient's norm (max_grad_norm, 1 unless set) is in {ARGUMENTS}, a pickle: "
            "--trust reads it, --clip-norm gives it."
        )
        result = dataclasses.replace(result, notes=(*result.notes, note))
    clip = find_clip(found)[0]
    norms = [each["grad_norm"] for each in _log(record) if isinstance(each.get("grad_norm"), (int, float))]
    if clip is not None and norms:
        over = sum(norm > clip for norm in norms) / len(norms)
        note = f"{over:.0%} of the {len(norms)} gradient norms in the Trainer's log are over the bound of {clip:g}."
        result = dataclasses.replace(result, notes=(*result.notes, note))
    return result


def _state(folder: Path) -> Mapping[str, Any]:
    """trainer_state.json, empty where there is none that can be read."""
    with contextlib.suppress(ValueError, OSError):
        content = json.loads((folder / "trainer_state.json").read_text())
        return content if isinstance(content, dict) else {}
    return {}


def _log(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    history = record.get("log_history")
    return [each for each in history if isinstance(each, dict)] if isinstance(history, list) else []


def _by_arguments(
    args: Any, record: Mapping[str, Any], scheduler: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> Schedule | None:
    """The schedule by transformers' own function; None where the arguments do not tell it."""
    kind, steps = getattr(args, "lr_scheduler_type", None), record.get("max_steps")
    if kind is None or not isinstance(steps, int) or steps <= 0:
        return None
    try:
        from transformers import get_scheduler

        warm_up = args.get_warmup_steps(steps)
        more = getattr(args, "lr_scheduler_kwargs", None) or None
        ahead = run_ahead(
            lambda optimizer: get_scheduler(kind, optimizer, warm_up, steps, scheduler_specific_kwargs=more),
            scheduler,
            groups,
            max(0, steps - int(scheduler["last_epoch"])),
            str(getattr(kind, "value", kind)),
        )
    except Exception:  # another version's arguments, or a kind that needs more than them
        return None
    return None if ahead.problem else ahead


def _by_log(ahead: Schedule, record: Mapping[str, Any]) -> Schedule:
    """A schedule whose function is not known, by the rates that the Trainer has logged so far."""
    rates = [each["learning_rate"] for each in _log(record) if isinstance(each.get("learning_rate"), (int, float))]
    if not ahead.assumed or len(rates) < 2:
        return ahead
    if rates[-1] > rates[-2]:
        words = "its functions are not in the file; the log shows it warming up, so that its base rate is its peak"
        return dataclasses.replace(ahead, problem=words)
    words = "its functions are not in the file; the log shows it past its peak"
    return dataclasses.replace(ahead, rates=ahead.rates[:1], momenta=ahead.momenta[:1], problem=words, assumed=False)
