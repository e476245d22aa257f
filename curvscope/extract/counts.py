"""How many rows a layer has, and how many of them are padding: sums that add up over pieces of the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowCounts:
    """How many rows some examples have; with more of them it adds up.

    Attributes:
        real: rows that are not padding.
        there: all rows.
        reached: examples that have a real row.
        present: examples that have any row.
        longest: rows of the longest example.
    """

    real: float
    there: float
    reached: float
    present: float
    longest: int

    @classmethod
    def of(cls, real: Tensor, there: Tensor, longest: int) -> RowCounts:
        """From the numbers of rows of every example [N]."""
        real, there = real.double(), there.double()
        return cls(float(real.sum()), float(there.sum()), float((real > 0).sum()), float((there > 0).sum()), longest)

    def __add__(self, other: RowCounts) -> RowCounts:
        """Of more examples."""
        return RowCounts(
            self.real + other.real,
            self.there + other.there,
            self.reached + other.reached,
            self.present + other.present,
            max(self.longest, other.longest),
        )

    @property
    def positions(self) -> float:
        """The mean number of real rows over the examples that have any; 1 only where all of these have one."""
        return self.real / self.reached if self.reached else 0.0

    @property
    def unmasked(self) -> RowCounts:
        """The counts if no row is padding."""
        return RowCounts(self.there, self.there, self.present, self.present, self.longest)

    @property
    def padded(self) -> float:
        """The share of rows that are padding."""
        return 1.0 - self.real / self.there if self.real < self.there else 0.0


def side_by_side(roles: Iterable[RowCounts]) -> RowCounts:
    """The counts of a weight whose roles have these: positions of one are further positions of the same examples."""
    each = list(roles)
    return RowCounts(
        sum(one.real for one in each),
        sum(one.there for one in each),
        max(one.reached for one in each),
        max(one.present for one in each),
        sum(one.longest for one in each),
    )
