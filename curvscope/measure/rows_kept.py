"""The rows a[n, r] and g[n, k, r] of one layer, from whatever its columns were kept as."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.extract.collector import Columns, Extract
from curvscope.measure.split import reduced_rows


@dataclass(frozen=True)
class Rows:
    """Inputs [N', R, d_in(+1)] and gradients [K, N', R, d_out] in the unit of the columns; N' = N T.

    T is 1, or the number of positions of every example that were kept apart as examples of their own.
    """

    inputs: Tensor
    gradients: Tensor
    examples: int
    real: Tensor | None

    @property
    def apart(self) -> int:
        """T."""
        return self.inputs.shape[0] // self.examples

    def reduced(self) -> tuple[Tensor, Tensor]:
        """(abar, gsum) of every example: [N, 1, d_in(+1)] and [K T, N, 1, d_out]."""
        N, T = self.examples, self.apart
        a = self.inputs.unflatten(0, (N, T)).transpose(1, 2).flatten(1, 2)  # [N, calls T, d_in]
        counts = None
        if self.real is not None:
            a = a * self.real.unsqueeze(-1)
            counts = self.real.sum(1)
        K, _, _, d_out = self.gradients.shape
        g = self.gradients.sum(2).view(K, N, T, d_out).transpose(1, 2).reshape(K * T, N, 1, d_out)
        return reduced_rows(a, g, counts)[0], g


def rows_of(extract: Extract) -> Rows | str:
    """The rows of a layer, or in words why there are none."""
    columns = extract.columns
    if isinstance(columns, list):
        return "the layer has groups, each with rows of its own"
    if columns is None:
        return "the layer's columns were not kept"
    if extract.tokens is not None:
        return "an embedding's rows are not kept beside its block"
    if columns.inputs is not None and columns.gradients is not None:
        return Rows(columns.inputs, columns.gradients, extract.examples, extract.real)
    if columns.row_inputs is not None and columns.row_gradients is not None:
        return Rows(columns.row_inputs, columns.row_gradients, extract.examples, extract.real)
    return "the layer's rows are too large to be kept beside its columns"


def with_rows(block: Block, rows: Rows) -> Block:
    """The block stated by its rows: the same G, whose columns can be worked on piece by piece."""
    columns = block.columns
    if columns.form != "formed":
        return block
    kept = Columns("factored", columns.examples, columns.count, inputs=rows.inputs, gradients=rows.gradients)
    stated = Block(kept, block.d_out, block.d_in, block.piece_bytes)
    stated.gram = block.gram
    return stated


def mean_input(extract: Extract, like: Tensor, *, bias: bool) -> Tensor:
    """The mean of the real rows, with the bias's constant 1, float64."""
    assert extract.mean_input is not None
    mean = extract.mean_input.to(like.device)
    return torch.cat([mean, mean.new_ones(1)]) if bias else mean
