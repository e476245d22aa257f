"""Expand and reduce where they are the same matrix, as in a layer with one position: shown once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from curvscope.records import DampingRow, ErrorRow, Layer, RangeRow, SpectrumRow

Row = TypeVar("Row", ErrorRow, SpectrumRow, RangeRow, DampingRow)


def same(layer: Layer) -> bool:
    """Whether both flavours of the layer are one matrix."""
    return layer.row.better_flavour == "same"


def without_twins(layer: Layer, rows: Iterable[Row]) -> list[Row]:
    """The rows without those of reduce where it is the same matrix as expand."""
    return [row for row in rows if not (same(layer) and row.approximation.endswith("_reduce"))]


def title(layer: Layer, approximation: str) -> str:
    """An approximation's name; where both flavours are the same matrix it stands for both."""
    return f"{approximation} = reduce" if same(layer) and approximation.endswith("_expand") else approximation
