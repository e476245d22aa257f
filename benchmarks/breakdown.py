"""Where a call's time goes, by part of curvscope: Python functions with the torch operations that they call."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable

# The first part whose fragment occurs in the file name takes the time.
PARTS = (
    ("factor products", ("extract/symmetric",)),
    ("rows and patches", ("extract/rows", "graph/layout")),
    ("root of the loss Hessian", ("extract/roots", "extract/categorical", "extract/output_root", "load/loss")),
    (
        "sums over positions, the gradient's product",
        ("extract/sweep", "extract/collector", "extract/padding", "extract/grouped"),
    ),
    ("forward passes", ("eval_with_key", "torch/nn/", "graph/", "torch/fx/")),
)
BACKWARD = "backward passes"
OTHER = "other"

Function = tuple[str, int, str]


def breakdown(call: Callable[[], object], repeats: int = 3) -> dict[str, float]:
    """Seconds by part of the fastest call, the largest first; their sum is the whole, the profiler's own cost in it.

    A built-in function's time belongs to whoever calls it, except the run of the autograd engine, which is the
    backward passes. Hooks run in the calling thread on a CPU and are then told apart from the engine.
    """
    return min((_profiled(call) for _ in range(repeats)), key=lambda parts: sum(parts.values()))


def _profiled(call: Callable[[], object]) -> dict[str, float]:
    profile = cProfile.Profile()
    profile.runcall(call)
    parts: dict[str, float] = {}

    def add(part: str, seconds: float) -> None:
        parts[part] = parts.get(part, 0.0) + seconds

    entries = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for function, (_, _, own, _, callers) in entries.items():
        if "run_backward" in function[2]:
            add(BACKWARD, own)
        elif function[0] == "~" and callers:
            for caller, (_, _, own_there, _) in callers.items():
                add(_part(caller), own_there)
        else:
            add(_part(function), own)
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def _part(function: Function) -> str:
    file = function[0].replace("\\", "/")
    return next((part for part, fragments in PARTS if any(f in file for f in fragments)), OTHER)
