"""Shifted solves (S + mu I)^{-1} with one symmetric positive semidefinite S, for a whole grid of mu.

Either from S's eigenvectors (here), or, where S is large, from its tridiagonal form (`curvature.tridiagonal`).
Both work in coordinates of their own, into which `inward` and out of which `outward` lead; there S is cheap.

Eigenvalues up to `relative` = n eps times the largest, n = max(P, N K), count as zero, with all that lies along their
eigenvectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float64
from torch import Tensor


class Solver(ABC):
    """S in the coordinates of a decomposition.

    Attributes:
        all_values: every eigenvalue of S, ascending, as the decomposition gave them.
        values: those that do not count as zero.
        relative: what counts as zero, over the largest eigenvalue.
    """

    def __init__(self, all_values: Float64[Tensor, " n"], relative: float) -> None:
        self.all_values = all_values
        self.relative = relative
        self.least = max(float(all_values[-1]), 0.0) * relative
        self.values = all_values[all_values > self.least]

    @abstractmethod
    def inward(self, X: Float64[Tensor, "n k"]) -> Float64[Tensor, "c k"]:
        """Columns in these coordinates."""

    @abstractmethod
    def outward(self, X: Float64[Tensor, "c k"]) -> Float64[Tensor, "n k"]:
        """Columns out of these coordinates."""

    @abstractmethod
    def pseudo(self, x: Float64[Tensor, " c"]) -> Float64[Tensor, " c"]:
        """S^+ x, in these coordinates."""

    @abstractmethod
    def shifted(self, x: Float64[Tensor, " c"], shifts: Float64[Tensor, " m"]) -> Float64[Tensor, "m c"]:
        """(S + mu I)^{-1} x for every mu, in these coordinates; x has no part along eigenvalues that count as zero."""

    @abstractmethod
    def times(self, X: Float64[Tensor, "m c"]) -> Float64[Tensor, "m c"]:
        """S times rows, in these coordinates."""

    def solve(self, x: Float64[Tensor, " n"], shift: float) -> Float64[Tensor, " n"]:
        """(S + shift I)^{-1} x, both outside these coordinates; x is in S's range."""
        inner = self.shifted(self.inward(x[:, None])[:, 0], torch.tensor([shift], dtype=x.dtype, device=x.device))
        return self.outward(inner.T)[:, 0]


class EigenSolver(Solver):
    """S by the eigenvectors [n, rank] of its nonzero eigenvalues."""

    def __init__(self, all_values: Float64[Tensor, " n"], all_vectors: Float64[Tensor, "n n"], relative: float) -> None:
        """From all eigenpairs, ascending."""
        super().__init__(all_values, relative)
        self.vectors = all_vectors[:, all_values > self.least]

    def inward(self, X: Float64[Tensor, "n k"]) -> Float64[Tensor, "rank k"]:
        """Components along the eigenvectors."""
        return self.vectors.T @ X

    def outward(self, X: Float64[Tensor, "rank k"]) -> Float64[Tensor, "n k"]:
        """Combinations of the eigenvectors."""
        return self.vectors @ X

    def pseudo(self, x: Float64[Tensor, " rank"]) -> Float64[Tensor, " rank"]:
        """Divided by the eigenvalues."""
        return x / self.values

    def shifted(self, x: Float64[Tensor, " rank"], shifts: Float64[Tensor, " m"]) -> Float64[Tensor, "m rank"]:
        """Divided by the shifted eigenvalues."""
        return x / (self.values + shifts[:, None])

    def times(self, X: Float64[Tensor, "m rank"]) -> Float64[Tensor, "m rank"]:
        """Multiplied with the eigenvalues."""
        return X * self.values
