"""What stands beside the optimizer in a checkpoint and changes its steps: gradient clipping and a scheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from curvscope.load.problem import OptimizerState
from curvscope.load.schedule import schedule

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
    groups = state.state_dict["param_groups"]
    found = find_scheduler(content)
    ahead = None if found is None else schedule(found, groups)
    return dataclasses.replace(state, clip=clip, notes=notes, schedule=ahead)


def find_scheduler(content: Mapping[Any, Any]) -> Mapping[str, Any] | None:
    """The scheduler's state_dict under a usual key (Lightning keeps a list: its first)."""
    for key in SCHEDULER_KEYS:
        found = content.get(key)
        found = found[0] if isinstance(found, (list, tuple)) and found else found
        if isinstance(found, Mapping) and ("_last_lr" in found or "last_epoch" in found):
            return found
    return None


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
