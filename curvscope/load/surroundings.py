"""What stands beside the optimizer in a checkpoint and changes its steps: gradient clipping and a scheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from curvscope.load.optimizer import SEVERAL
from curvscope.load.problem import OptimizerState, Schedule
from curvscope.load.schedule import fits, next_step_alone, schedule

SCHEDULER_KEYS = ("lr_scheduler", "scheduler", "lr_schedulers", "scheduler_state_dict", "lr_scheduler_state_dict")
CLIP_KEYS = ("gradient_clip_val", "max_grad_norm", "grad_clip", "clip_grad_norm", "clip_grad", "grad_clip_norm")
CLIP_VALUE_KEYS = ("clip_grad_value", "grad_clip_value", "gradient_clip_value", "clip_value")
ALGORITHM = "gradient_clip_algorithm"
SETTINGS_KEYS = ("hyper_parameters", "hparams", "args", "config", "cfg")


def with_surroundings(state: OptimizerState | None, content: Mapping[Any, Any]) -> OptimizerState | None:
    """The optimizer's state with the bound on the gradient and the schedule of the same checkpoint."""
    if state is None:
        return None
    clip, notes = find_clip(content)
    optimizers = content.get(SEVERAL)
    if isinstance(optimizers, (list, tuple)) and len(optimizers) > 1:
        notes += (f"The checkpoint holds {len(optimizers)} optimizers; the first is the one judged.",)
    return dataclasses.replace(state, clip=clip, notes=notes, schedule=_schedule(content, state))


def _schedule(content: Mapping[Any, Any], state: OptimizerState) -> Schedule | None:
    """What the checkpoint's schedulers do to this optimizer.

    Of several that of this optimizer is the only one whose last rates are its own; where more than one is, they act on
    it together, in an order that the checkpoint does not tell.
    """
    groups = state.state_dict["param_groups"]
    found = find_schedulers(content)
    if len(found) > 1:
        optimizers = content.get(SEVERAL)
        own = [one for one in found if fits(one, groups)]
        if not isinstance(optimizers, (list, tuple)) or len(optimizers) < 2 or len(own) != 1:
            problem = f"the checkpoint holds {len(found)} schedulers, and what they do together is not modelled"
            return next_step_alone("several schedulers", groups, problem)
        found = own
    return schedule(found[0], groups) if found else None


def find_schedulers(content: Mapping[Any, Any]) -> Sequence[Mapping[str, Any]]:
    """The schedulers' state_dicts under the first usual key that has any (Lightning keeps a list)."""
    for key in SCHEDULER_KEYS:
        value = content.get(key)
        listed = value if isinstance(value, (list, tuple)) else [value]
        found = [one for one in listed if isinstance(one, Mapping) and ("_last_lr" in one or "last_epoch" in one)]
        if found:
            return found
    return ()


def find_clip(content: Mapping[Any, Any]) -> tuple[float | None, tuple[str, ...]]:
    """The bound on the gradient's norm, at the checkpoint's top or among its hyperparameters, and notes.

    A bound on single values (Lightning's gradient_clip_algorithm "value") is only told.
    """
    for place in [content, *(content[key] for key in SETTINGS_KEYS if key in content)]:
        values = place if isinstance(place, Mapping) else getattr(place, "__dict__", {})
        by_value = str(values.get(ALGORITHM, "")).rpartition(".")[2].lower() == "value"
        for key in (*CLIP_VALUE_KEYS, *CLIP_KEYS):
            bound = values.get(key)
            if not isinstance(bound, (int, float)) or isinstance(bound, bool) or not bound > 0:
                continue
            if by_value or key in CLIP_VALUE_KEYS:
                return None, (
                    f"The gradient's values are clipped at {bound:g} each, which is not modelled: what is judged are "
                    "steps without that.",
                )
            return float(bound), ()
    return None, ()
