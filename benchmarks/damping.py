"""`python -m benchmarks.damping`: what the damping stage adds to an analysis, against the passes that extract.

The stage is all that `measure.damping` does, the conditions aside, and what G's eigenvectors take beyond its
eigenvalues, which the spectrum needs anyway. The passes are those of the same analysis: factors, gradient and columns.
Both are counted in seconds of this process' own CPU time, at one thread, so that other processes weigh on both sides
alike.
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
from curvscope.curvature import block
from curvscope.curvature.eigen import eigh, eigvalsh
from curvscope.extract.sweep import sweep
from curvscope.measure import damping, layer

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


def measure(name: str) -> dict[str, float]:
    """CPU seconds of one analysis: passes, stage, eigenvectors (beyond eigenvalues), and their ratios."""
    workload = make(name)
    clock = Clock()
    values = clock.timed("eigenvalues", eigvalsh)

    def both(matrix: torch.Tensor) -> Any:
        values(matrix)
        return vectors(matrix)

    vectors = clock.timed("eigenvectors", eigh)
    from curvscope import pipeline

    with (
        mock.patch.object(pipeline, "sweep", clock.timed("passes", sweep)),
        mock.patch.object(layer, "damping_tables", clock.timed("stage", damping.damping_tables)),
        mock.patch.object(damping, "CONDITION_FREE", 0.0),
        mock.patch.object(block, "eigh", both),
    ):
        analyze(workload)
    found = clock.seconds
    found["added"] = found["eigenvectors"] - found["eigenvalues"]
    found["stage / passes"] = found["stage"] / found["passes"]
    found["stage and eigenvectors / passes"] = (found["stage"] + found["added"]) / found["passes"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.damping", description=__doc__)
    parser.add_argument("workloads", nargs="*", default=list(CHOICES), metavar="WORKLOAD", help="mlp, resnet, vit")
    parser.add_argument("--repeats", type=int, default=3, help="analyses of each workload (default: 3)")
    options = parser.parse_args()
    unknown = sorted(set(options.workloads) - set(WORKLOADS))
    if unknown:
        parser.error(f"no workload named {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    torch.set_num_threads(1)
    names = ("passes", "stage", "added", "stage / passes", "stage and eigenvectors / passes")
    print("CPU seconds at one thread, medians; load of the machine", f"{os.getloadavg()[0]:.1f}\n")
    print("| workload | passes | stage | eigenvectors | stage / passes | stage and eigenvectors / passes |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in options.workloads:
        runs = [measure(name) for _ in range(options.repeats + 1)][1:]
        cells = [f"{Spread.of([run[column] for run in runs]).median:.3g}" for column in names]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
