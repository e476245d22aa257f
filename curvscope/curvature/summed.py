"""The approximation of a weight that is used in several roles: the sum of its roles' Kronecker products.

A role that uses the transpose acts on X^T: B (x) A there is A (x) B in the layer's own orientation, so the terms share
one shape. Their sum has no eigenbasis of Kronecker form.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.eigen import eigvalsh
from curvscope.curvature.kronecker import Kronecker
from curvscope.curvature.lanczos import Extreme, largest_magnitude

# Up to this P all eigenvalues are taken from the matrix itself.
FORMED_PARAMETERS = 2048


class KroneckerSum:
    """M = sum_j B_j (x) A_j, terms of one shape, float64 arithmetic."""

    def __init__(self, terms: Sequence[Kronecker]) -> None:
        self.terms = list(terms)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.terms[0].B.shape[0], self.terms[0].A.shape[0]

    @cached_property
    def norm(self) -> float:
        """||M||_F, from sum_{i,j} <B_i, B_j> <A_i, A_j>."""
        squared = sum((p.A * q.A).sum() * (p.B * q.B).sum() for p in self.terms for q in self.terms)
        return float(squared) ** 0.5

    @cached_property
    def trace(self) -> float:
        """Tr M."""
        return sum(term.trace for term in self.terms)

    @cached_property
    def eigenvalues(self) -> Float64[Tensor, " P"]:
        """All eigenvalues, descending, from the matrix itself: only for P up to `FORMED_PARAMETERS`."""
        return eigvalsh(self.dense()).flip(0)

    def largest(self) -> Extreme:
        """The largest eigenvalue by Lanczos; M is positive semidefinite, so it is the largest in magnitude."""
        tolerance = 1e-9
        return largest_magnitude(self.matvec, self.shape, device=self.terms[0].A.device, tolerance=tolerance)

    def matvec(self, X: Float64[Tensor, "d_out d_in"]) -> Float64[Tensor, "d_out d_in"]:
        """M vec(X)."""
        return torch.stack([term.matvec(X) for term in self.terms]).sum(0)

    def inner(self, block: Block) -> float:
        """<G, M>."""
        return sum(term.inner(block) for term in self.terms)

    def dense(self) -> Float64[Tensor, "P P"]:
        """M itself."""
        return torch.stack([term.dense() for term in self.terms]).sum(0)
