"""`python -m benchmarks.damping`: what the damping stage adds to an analysis, against the extraction.

The extraction is what benchmarks/README.md says: the sweep of the same analysis (forward and backward passes, factors
of both flavours, gradient and columns of every layer), alone and with the exact blocks' Gram matrices and their
eigenvalues, which the report needs without damping. The stage is everything in `measure.damping` but the conditions,
with its share of EKFAC's pass over the columns, and what the decomposition of G takes beyond its eigenvalues. All are
seconds of this process' own CPU time, at one thread, so that other processes weigh on both sides alike; the workloads
take turns.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from benchmarks.clock import Spread
from benchmarks.ours import analyze
from benchmarks.workloads import WORKLOADS, make
from curvscope.curvature.eigen import eigvalsh
from curvscope.curvature.kronecker import Kronecker
from curvscope.curvature.tiles import Tile
from curvscope.extract.sweep import sweep
from curvscope.measure import damping, exact_layer
from curvscope.measure.condition import preconditioned_condition
from curvscope.measure.step_sums import FollowedSteps

CHOICES = ("mlp", "resnet", "vit")


class Clock:
    """CPU seconds spent in calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its seconds added up."""

        def call(*given: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return function(*given, **named)
            finally:
                self.add(name, time.process_time() - start)

        return call


class TimedSteps(FollowedSteps):
    """Steps whose share of EKFAC's pass is timed."""

    clock: Clock

    def __call__(self, tile: Tile) -> None:
        start = time.process_time()
        super().__call__(tile)
        self.clock.add("stage", time.process_time() - start)


def timed_stage(clock: Clock) -> type[damping.DampingStage]:
    """The stage with its parts timed: what it shares with the spectrum is done before, and on no one's account."""

    class TimedStage(damping.DampingStage):
        def __init__(self, subject: damping.Subject) -> None:
            for block in subject.blocks:
                clock.timed("gram", lambda block=block: (block.gram, block.diagonal))()
                clock.timed("eigenvalues", eigvalsh)(block.gram)
                clock.timed("decomposition", lambda block=block: block.solver)()
            clock.timed("stage", super().__init__)(subject)

        def follow(self, group: int, flavour: str, kronecker: Kronecker) -> FollowedSteps | None:
            clock.timed("shared", lambda: kronecker.bases)()
            return clock.timed("stage", super().follow)(group, flavour, kronecker)

        def tables(self, *given: Any) -> Any:
            return clock.timed("tables", super().tables)(*given)

    return TimedStage


def measure(name: str) -> dict[str, float]:
    """CPU seconds of one analysis by part, and their ratios."""
    workload = make(name)
    clock = Clock()
    from curvscope.extract import passes

    steps = type("TimedSteps", (TimedSteps,), {"clock": clock})
    with (
        mock.patch.object(passes, "sweep", clock.timed("extraction", sweep)),
        mock.patch.object(exact_layer, "DampingStage", timed_stage(clock)),
        mock.patch.object(damping, "FollowedSteps", steps),
        mock.patch.object(damping, "preconditioned_condition", clock.timed("conditions", preconditioned_condition)),
    ):
        clock.timed("analysis", analyze)(workload)
    found = clock.seconds
    found["stage"] += found["tables"] - found.get("conditions", 0.0)
    found["analysis"] -= found["eigenvalues"]  # taken twice here
    found["added"] = max(0.0, found["decomposition"] - found["eigenvalues"])
    found["both"] = found["stage"] + found["added"]
    found["exact"] = found["extraction"] + found["gram"] + found["eigenvalues"]
    for name in ("extraction", "exact", "analysis"):
        found[f"both / {name}"] = found["both"] / found[name]
    return found


COLUMNS = {
    "extraction": "sweep",
    "exact": "sweep and exact blocks",
    "stage": "stage",
    "added": "decomposition beyond eigenvalues",
    "both / extraction": "stage and decomposition / sweep",
    "both / exact": "/ sweep and exact blocks",
    "both / analysis": "/ analysis",
    "conditions": "conditions",
    "analysis": "analysis",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.damping", description=__doc__)
    parser.add_argument("workloads", nargs="*", default=list(CHOICES), metavar="WORKLOAD", help="mlp, resnet, vit")
    parser.add_argument("--repeats", type=int, default=3, help="analyses of each workload (default: 3)")
    options = parser.parse_args()
    unknown = sorted(set(options.workloads) - set(WORKLOADS))
    if unknown:
        parser.error(f"no workload named {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    torch.set_num_threads(1)
    print(f"CPU seconds at one thread, medians of {options.repeats}; load of the machine {os.getloadavg()[0]:.1f}\n")
    print(f"| workload | {' | '.join(COLUMNS.values())} |")
    print("| --- " * (len(COLUMNS) + 1) + "|")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in options.workloads}
    for _ in range(options.repeats + 1):
        for name, found in runs.items():
            found.append(measure(name))
    for name, found in runs.items():
        # the first of each warmed up
        cells = [f"{Spread.of([run.get(column, 0.0) for run in found[1:]]).median:.3g}" for column in COLUMNS]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
