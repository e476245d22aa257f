"""Groups side by side: the block-diagonal matrix of independent blocks, with the same few operations.

Rows of outputs are those of all groups, one group after the other; d_in is that of one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.kronecker import Approximation


class GroupedBlock:
    """The exact blocks of all groups: G = diag(G_1, ..., G_groups)."""

    def __init__(self, parts: Sequence[Block]) -> None:
        self.parts = list(parts)
        self.d_out = sum(part.d_out for part in parts)
        self.d_in = parts[0].d_in
        self.parameters = self.d_out * self.d_in
        self.total_columns = parts[0].total_columns
        self.dtype = parts[0].dtype
        self.device = parts[0].device
        self.piece_bytes = parts[0].piece_bytes

    @cached_property
    def norm(self) -> float:
        """||G||_F."""
        return float(sum(part.norm**2 for part in self.parts)) ** 0.5

    @cached_property
    def trace(self) -> float:
        """Tr G."""
        return float(sum(part.trace for part in self.parts))

    @cached_property
    def eigenvalues(self) -> Float64[Tensor, " small"]:
        """The leading eigenvalues of all groups together, descending."""
        return torch.cat([part.eigenvalues for part in self.parts]).sort(descending=True).values

    def matvec(self, X: Float64[Tensor, "d_out d_in"]) -> Float64[Tensor, "d_out d_in"]:
        """G vec(X)."""
        pieces = X.split([part.d_out for part in self.parts])
        return torch.cat([part.matvec(piece) for part, piece in zip(self.parts, pieces, strict=True)])

    def stacked(self) -> Tensor:
        """Every column with all its groups, [N K, d_out, d_in]."""
        return torch.cat([part.stacked() for part in self.parts], dim=1)

    def dense(self) -> Float64[Tensor, "P P"]:
        """G itself."""
        return torch.block_diag(*[part.dense() for part in self.parts])


class GroupedApproximation:
    """M = diag(M_1, ..., M_groups)."""

    def __init__(self, parts: Sequence[Approximation], outputs: Sequence[int]) -> None:
        self.parts = list(parts)
        self.outputs = list(outputs)

    @cached_property
    def norm(self) -> float:
        """||M||_F."""
        return float(sum(part.norm**2 for part in self.parts)) ** 0.5

    @cached_property
    def trace(self) -> float:
        """Tr M."""
        return float(sum(part.trace for part in self.parts))

    @cached_property
    def eigenvalues(self) -> Float64[Tensor, " P"]:
        """The eigenvalues of all groups together, descending."""
        return torch.cat([part.eigenvalues for part in self.parts]).sort(descending=True).values

    def matvec(self, X: Float64[Tensor, "d_out d_in"]) -> Float64[Tensor, "d_out d_in"]:
        """M vec(X)."""
        pieces = X.split(self.outputs)
        return torch.cat([part.matvec(piece) for part, piece in zip(self.parts, pieces, strict=True)])

    def dense(self) -> Float64[Tensor, "P P"]:
        """M itself."""
        return torch.block_diag(*[part.dense() for part in self.parts])
