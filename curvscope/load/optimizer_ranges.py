"""Numbers that no optimizer can be left with: a checkpoint written wrong, or a run that has diverged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# field -> least value, value it has to stay below
RANGES: dict[str, tuple[float, float]] = {
    "lr": (0.0, math.inf),
    "beta1": (0.0, 1.0),
    "beta2": (0.0, 1.0),
    "eps": (0.0, math.inf),
    "weight_decay": (0.0, math.inf),
    "momentum": (0.0, math.inf),
}
WORDS = {"lr": "learning rate", "weight_decay": "weight decay"}
# Sums of squares: none can be negative.
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


def out_of_range(settings: Mapping[str, Any]) -> str:
    """What is wrong with a group's numbers, in words; empty where nothing is. NaN for an unknown rate passes."""
    for name, (least, below) in RANGES.items():
        value = settings.get(name, least)
        if name == "lr" and math.isnan(value):
            continue
        if not least <= value < below:
            limits = f"0 or more and below {below:g}" if math.isfinite(below) else "0 or more and finite"
            return f"its {WORDS.get(name, name)} is {value:g}, which has to be {limits}"
    return ""


def spoiled(moments: Mapping[str, Tensor]) -> str:
    """Which stored moment holds values that it can't have, in words; empty where none does."""
    for name, value in moments.items():
        if not bool(value.isfinite().all()):
            return f"{name} has values that are not finite"
        if name in SQUARES and bool((value < 0).any()):
            return f"{name}, a mean or sum of squares, has negative values"
    return ""
