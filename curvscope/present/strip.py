"""A layer's damping as one line: how good each value of the grid is, the safe range, and where the optimizer stands."""

from __future__ import annotations

import math
from collections.abc import Sequence

from curvscope.present.sparkline import ASCII_BLOCKS, BLOCKS
from curvscope.records import DampingRow, RangeRow

HARM = ("×", "x")
UNKNOWN = ("–", "?")
LOW, HIGH, NOW = "[", "]", "|"


def strip(rows: Sequence[DampingRow], found: RangeRow, *, ascii_only: bool = False) -> str:
    """One character a value of the grid, from the smallest damping up.

    Height is the decrease of the exact quadratic model against the best on the grid; a cross where the model grows, a
    dash where it is not known. Brackets enclose the safe range (none where it is empty); a bar stands where the
    optimizer's own damping is.

    Args:
        rows: an approximation's rows in one form, in any order; of those off the grid only the places are used.
        found: its row of tables/ranges.
        ascii_only: characters that any encoding has.
    """
    grid = sorted((row for row in rows if on_grid(row)), key=lambda row: row.damping)
    best = max((row.predicted_decrease for row in grid if row.predicted_decrease > 0), default=math.nan)
    cells = [(row.damping, 1, _cell(row.predicted_decrease, best, ascii_only)) for row in grid]
    if not grid:
        return ""
    safe = not found.low > found.high and found.status == "ok"
    if safe:
        low = grid[0].damping if math.isnan(found.low) else found.low
        high = grid[-1].damping if math.isnan(found.high) else found.high
        cells += [(low, 0, LOW), (high, 2, HIGH)]
    if not math.isnan(found.current):
        # inside the brackets it shares an edge with, unless it is beyond them
        cells.append((found.current, 1, NOW))
    return "".join(character for _, _, character in sorted(cells, key=lambda cell: cell[:2]))


def on_grid(row: DampingRow) -> bool:
    """Whether the row's damping is a power of ten of the mean eigenvalue."""
    if not row.relative > 0:
        return False
    decades = math.log10(row.relative)
    return abs(decades - round(decades)) < 1e-9


def _cell(decrease: float, best: float, ascii_only: bool) -> str:
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    if math.isnan(decrease):
        return UNKNOWN[ascii_only]
    if decrease <= 0:
        return HARM[ascii_only]
    return blocks[min(len(blocks) - 1, int(decrease / best * len(blocks)))]
