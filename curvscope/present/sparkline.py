"""A spectrum as a line or a picture of block characters: logarithmic height over rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from curvscope.records import Array

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "._-~=+*#"
LINE_DECADES = 8


def sparkline(eigenvalues: Array, width: int, *, ascii_only: bool = False) -> str:
    """At most `width` characters; one step of height is a decade, full height the largest eigenvalue.

    The characters stand for evenly spread ranks; the lowest is 1e-7 of the largest eigenvalue, and less.
    """
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    values = sampled(eigenvalues, width)
    if not values or values[0] <= 0:
        return ""
    levels = [max(0.0, LINE_DECADES - 1 + _decades(value / values[0])) for value in values]
    return "".join(blocks[min(LINE_DECADES - 1, round(level))] for level in levels)


@dataclass(frozen=True)
class Picture:
    """A drawn spectrum: `rows` from the top, each with its axis label; `axis` names the ranks."""

    rows: list[tuple[str, str]]
    axis: str


def picture(
    eigenvalues: Array, other: Array | None = None, *, width: int, height: int, ascii_only: bool = False
) -> Picture:
    """The spectrum as filled columns, `other` as dots over it, on one logarithmic scale in whole decades.

    `other` is drawn over the same ranks; ranks beyond the last of `eigenvalues` are left out.
    """
    full, dot, blocks = ("#", "o", ASCII_BLOCKS) if ascii_only else ("█", "•", BLOCKS)
    filled = sampled(eigenvalues, width)
    dots = _at_same_ranks(other, len(eigenvalues), len(filled)) if other is not None else []
    positive = [value for value in (*filled, *dots) if value > 0]
    if not positive:
        return Picture([], "")
    top = math.ceil(_decades(max(positive)))
    span = top - _decades(min(positive))
    per_row = next(step for step in _steps() if step * height >= span)
    rows = []
    for row in range(height):
        low = top - (row + 1) * per_row
        cells = []
        for index, value in enumerate(filled):
            part = (_decades(value) - low) / per_row
            # The smallest value of all may lie on the lower edge of the last row.
            visible = part > 0 or (part == 0 and row == height - 1)
            cell = full if part >= 1 else blocks[int(part * len(blocks))] if visible else " "
            if index < len(dots) and dots[index] > 0:
                dot_row = int((top - _decades(dots[index])) / per_row)
                cell = dot if min(dot_row, height - 1) == row else cell
            cells.append(cell)
        edge = low + per_row
        rows.append((f"1e{edge:.0f}" if edge == round(edge) else "", "".join(cells)))
    last = f"{len(eigenvalues):,}"
    return Picture(rows, "1" + last.rjust(max(len(last) + 1, len(filled) - 1)))


def sampled(eigenvalues: Array, width: int) -> list[float]:
    """`width` values at evenly spread ranks, the first rank first; all of them where there are fewer.

    The largest eigenvalue always stands first and the smallest last.
    """
    size = len(eigenvalues)
    if size <= width:
        return [float(value) for value in eigenvalues]
    ranks = np.linspace(0, size - 1, width).round().astype(int)
    return [float(eigenvalues[rank]) for rank in ranks]


def _at_same_ranks(values: Array, size: int, width: int) -> Sequence[float]:
    """`values` at the ranks that `sampled` picks from `size` of them; 0 beyond its end."""
    ranks = np.linspace(0, size - 1, width).round().astype(int)
    return [float(values[rank]) if rank < len(values) else 0.0 for rank in ranks]


def _steps() -> Iterator[float]:
    """Decades a row, such that edges of rows fall on whole decades: 1/8, 1/4, 1/2, 1, 3/2, 2, ..."""
    yield from (0.125, 0.25)
    step = 0.5
    while True:
        yield step
        step += 0.5


def _decades(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf
