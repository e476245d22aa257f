"""Seconds of a call, with the device's queue empty before and after, and how repeats are summed up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    """The fastest of that many calls, after one that is not counted."""
    call()
    return min(seconds_of(call) for _ in range(repeats))


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of the repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Round by round, so that whatever slows the machine down slows both sides of a pair."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])
