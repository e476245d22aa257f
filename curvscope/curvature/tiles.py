"""The columns turned into a Kronecker basis, U_B^T V U_A, one rectangle of the weight at a time.

A tile holds every column on its rectangle. Whatever adds over the entries of the weight (the diagonal of G in that
basis, inner products of columns with matrices that are known there) is taken in one pass, and the turned columns, as
large as the block's own, are never all there at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from curvscope.extract.collector import Columns

# Products with about so many matrices at once, which tiles of outer products leave room for.
MATRICES = 64


@dataclass(frozen=True)
class Tile(ABC):
    """All columns on the rectangle `outputs` x `inputs` of the weight, ordered k, n; products are taken in `dtype`."""

    outputs: slice
    inputs: slice
    dtype: torch.dtype

    @cached_property
    def squares(self) -> Float64[Tensor, "o i"]:
        """The sum of squares over the columns: G's diagonal in this basis."""
        return self._squares()

    @abstractmethod
    def _squares(self) -> Tensor: ...

    @abstractmethod
    def products(self, X: Float[Tensor, "m o i"]) -> Float64[Tensor, "m columns"]:
        """The tile's share of V^T vec(X)."""


@dataclass(frozen=True)
class DenseTile(Tile):
    """The columns as `values` [N K, o, i]."""

    values: Tensor

    def _squares(self) -> Tensor:
        return torch.linalg.vector_norm(self.values, dim=0, dtype=torch.float64).square()

    def products(self, X: Float[Tensor, "m o i"]) -> Float64[Tensor, "m columns"]:
        """One product with all columns."""
        return (X.flatten(1) @ self.values.flatten(1).T).double()


@dataclass(frozen=True)
class OuterTile(Tile):
    """The columns as outer products of `gradients` [K, N, o] and `rows` [N, i].

    The first `null` inputs of the basis belong to eigenvalues that are zero but for rounding, because A has no more
    than N others: the rows are zero there, and products leave them out.
    """

    rows: Tensor
    gradients: Tensor
    null: int

    def _squares(self) -> Tensor:
        return self.gradients.square().sum(0).double().T @ self.rows.square().double()

    def products(self, X: Float[Tensor, "m o i"]) -> Float64[Tensor, "m columns"]:
        """Rows first, then gradients."""
        live = X[:, :, self.null :].flatten(0, 1)
        half = (self.rows[:, self.null :] @ live.T).unflatten(1, X.shape[:2])  # [N, m, o]
        each = torch.bmm(half, self.gradients.permute(1, 2, 0))  # [N, m, K]
        return each.permute(1, 2, 0).flatten(1).double()


Watch = Callable[[Tile], None]


def turned_tiles(
    columns: Columns,
    U_B: Float64[Tensor, "d_out d_out"],
    U_A: Float64[Tensor, "d_in d_in"],
    *,
    dtype: torch.dtype,
    piece_bytes: int,
) -> Iterator[Tile]:
    """Tiles that cover the weight, of columns that are kept (not of a block that is formed), multiplied in `dtype`."""
    U_B, U_A = U_B.to(dtype), U_A.to(dtype)
    if columns.form == "outer":
        yield from _outer_tiles(columns, U_B, U_A, dtype, piece_bytes)
    elif columns.values is not None:
        yield from _dense_tiles(columns.values.flatten(0, 1), U_B, U_A, dtype, piece_bytes)
    else:
        yield from _factored_tiles(columns, U_B, U_A, dtype, piece_bytes)


def _outer_tiles(
    columns: Columns, U_B: Tensor, U_A: Tensor, dtype: torch.dtype, piece_bytes: int
) -> Iterator[OuterTile]:
    assert columns.inputs is not None and columns.gradients is not None
    rows = columns.inputs.squeeze(1).to(dtype) @ U_A
    gradients = columns.gradients.squeeze(2).to(dtype) @ U_B
    examples, d_in = rows.shape
    null = max(0, d_in - examples)
    rounding = 100 * torch.finfo(dtype).eps * d_in**0.5
    if null and float(torch.linalg.norm(rows[:, :null])) > rounding * float(torch.linalg.norm(rows)):
        null = 0
    height = max(1, piece_bytes // (8 * MATRICES * (d_in + examples)))
    for outputs in _slices(gradients.shape[2], height):
        yield OuterTile(outputs, slice(0, d_in), dtype, rows, gradients[:, :, outputs], null)


def _dense_tiles(values: Tensor, U_B: Tensor, U_A: Tensor, dtype: torch.dtype, piece_bytes: int) -> Iterator[DenseTile]:
    count, d_out, d_in = values.shape
    width = max(1, piece_bytes // (2 * count * d_out * dtype.itemsize))
    step = max(1, piece_bytes // (4 * d_out * d_in * dtype.itemsize))
    for inputs in _slices(d_in, width):
        basis = U_A[:, inputs]
        turned = [U_B.T @ (values[few].to(dtype) @ basis) for few in _slices(count, step)]
        yield DenseTile(slice(0, d_out), inputs, dtype, turned[0] if len(turned) == 1 else torch.cat(turned))


def _factored_tiles(
    columns: Columns, U_B: Tensor, U_A: Tensor, dtype: torch.dtype, piece_bytes: int
) -> Iterator[DenseTile]:
    assert columns.inputs is not None and columns.gradients is not None
    a, g = columns.inputs, columns.gradients
    examples, positions, d_in = a.shape
    count, d_out = columns.count, g.shape[3]
    rows = a.to(dtype) @ U_A
    per_output = examples * count * (positions + d_in) * dtype.itemsize
    height = max(1, min(d_out, piece_bytes // per_output))
    step = max(1, piece_bytes // (4 * count * positions * d_out * dtype.itemsize))
    for outputs in _slices(d_out, height):
        basis = U_B[:, outputs]
        turned = [
            torch.matmul((g[:, few].to(dtype) @ basis).transpose(2, 3), rows[few]) for few in _slices(examples, step)
        ]
        values = turned[0] if len(turned) == 1 else torch.cat(turned, dim=1)
        yield DenseTile(outputs, slice(0, d_in), dtype, values.flatten(0, 1))


def _slices(size: int, step: int) -> Iterator[slice]:
    for low in range(0, size, step):
        yield slice(low, min(size, low + step))
