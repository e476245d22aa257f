"""Seconds of work, as far as a busy machine lets them be told from seconds of waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# A call is repeated until it has taken this long in all, and at least so often.
LEAST_SECONDS = 0.02
LEAST_REPEATS = 3
MOST_REPEATS = 200


@dataclass(frozen=True)
class Moment:
    """A point in time on both clocks."""

    wall: float
    work: float

    def since(self, start: Moment) -> float:
        """Seconds of work since then: of the wall clock or of the process's CPU time, whichever are fewer.

        Other programs that take turns on the cores add to the wall clock, more threads than one to the CPU time.
        """
        return max(min(self.wall - start.wall, self.work - start.work), 0.0)


def now(device: torch.device | None = None) -> Moment:
    """This moment, on a GPU once its queue is empty; there the wall clock alone counts."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        wall = time.perf_counter()
        return Moment(wall, wall)
    return Moment(time.perf_counter(), time.process_time())


def seconds_of(call: Callable[[], object], device: torch.device | None = None) -> float:
    """The fewest seconds that the call took, after one that is not counted.

    Repeated for `LEAST_SECONDS` and `LEAST_REPEATS` times: of many short calls some are undisturbed.
    """
    call()
    best, total, repeats = float("inf"), 0.0, 0
    while repeats < LEAST_REPEATS or (total < LEAST_SECONDS and repeats < MOST_REPEATS):
        start = now(device)
        call()
        taken = now(device).since(start)
        best, total, repeats = min(best, taken), total + taken, repeats + 1
    return max(best, 1e-9)
