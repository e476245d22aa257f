"""Shifted solves with a large matrix from its tridiagonal form T = Q^T S Q alone.

S's eigenvalues come from T, a solve with T + mu I takes O(n), and Q is applied as reflectors, 2 n^2 flops a vector:
eigenvectors, twice the work of T, are needed only where eigenvalues count as zero, and then of those that do or of
those that do not, whichever are fewer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64
from scipy.linalg import eigh_tridiagonal, lapack
from torch import Tensor

from curvscope.curvature.eigen import eigvalsh
from curvscope.curvature.shifted import Solver

# S^+ by T + shift I, the shift this share of the smallest eigenvalue that counts: every round leaves it of the error.
DAMPED_SHARE = 0.125
ROUNDS = 18

Array = npt.NDArray[np.float64]


class TridiagonalSolver(Solver):
    """S by its tridiagonal form, on the CPU."""

    def __init__(self, matrix: Float64[Tensor, "n n"], relative: float) -> None:
        S = matrix.numpy()
        work, _ = lapack.dsytrd_lwork(len(S), lower=1)
        # symmetric: the transpose is the same matrix, in the order that LAPACK copies
        reduced, self._diagonal, self._beside, self._scales, _ = lapack.dsytrd(S.T, lower=1, lwork=int(work))
        values, failed = lapack.dsterf(self._diagonal, self._beside)
        if failed:
            values = eigvalsh(matrix).numpy()
        super().__init__(torch.from_numpy(values), relative)
        self._reflectors = torch.from_numpy(reduced.T[:-1, 1:].copy()).T
        self._zeros = len(values) - self.values.numel()
        self._of_zero = 2 * self._zeros <= len(values)
        self._vectors = self._vectors_on_one_side()

    def _vectors_on_one_side(self) -> Array | None:
        """T's eigenvectors for the eigenvalues that count as zero, or for the others where these are fewer."""
        size = len(self._diagonal)
        first, last = (0, self._zeros - 1) if self._of_zero else (self._zeros, size - 1)
        if last < first:
            return None
        _, vectors = eigh_tridiagonal(self._diagonal, self._beside, select="i", select_range=(first, last))
        return np.asarray(vectors)

    def _kept(self, X: Array) -> Array:
        """Columns [n, k] without their parts along eigenvalues that count as zero."""
        if self._vectors is None:
            return X if self._of_zero else np.zeros_like(X)
        along = self._vectors @ (self._vectors.T @ X)
        return X - along if self._of_zero else along

    def _divided(self, X: Array, shift: float) -> Array:
        """(T + shift I)^{-1} X, by elimination with pivots; a matrix singular to rounding is moved by rounding."""
        for nudge in (0.0, self.least):
            *_, found, info = lapack.dgtsv(self._beside, self._diagonal + (shift + nudge), self._beside, X)
            if info == 0:
                return np.asarray(found)
        raise AssertionError("a shifted positive semidefinite matrix is singular")

    def inward(self, X: Float64[Tensor, "n k"]) -> Float64[Tensor, "n k"]:
        """Q^T X."""
        return self._turned(X, transpose=True)

    def outward(self, X: Float64[Tensor, "n k"]) -> Float64[Tensor, "n k"]:
        """Q X."""
        return self._turned(X, transpose=False)

    def _turned(self, X: Tensor, *, transpose: bool) -> Tensor:
        """Q leaves the first coordinate alone."""
        rest = torch.ormqr(self._reflectors, torch.from_numpy(self._scales), X[1:].contiguous(), transpose=transpose)
        return torch.cat([X[:1], rest])

    def pseudo(self, x: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
        """S^+ x, in these coordinates."""
        right = self._kept(x.numpy()[:, None])
        if not self.values.numel():
            return torch.zeros_like(x)
        if self._zeros == 0:
            return torch.from_numpy(self._divided(right, 0.0)[:, 0])
        # T itself is singular; T + shift is not, and what it leaves of the right side is divided again
        shift, found = DAMPED_SHARE * self.least, np.zeros_like(right)
        for _ in range(ROUNDS):
            found = found + self._kept(self._divided(self._kept(right - self._product(found)), shift))
        return torch.from_numpy(found[:, 0])

    def shifted(self, x: Float64[Tensor, " n"], shifts: Float64[Tensor, " m"]) -> Float64[Tensor, "m n"]:
        """(S + mu I)^{-1} x for every mu, in these coordinates; x has no part along eigenvalues that count as zero."""
        right = x.numpy()[:, None]
        found = [self._divided(right, shift)[:, 0] for shift in shifts.tolist()]
        return torch.from_numpy(self._kept(np.stack(found, 1)).T.copy())

    def times(self, X: Float64[Tensor, "m n"]) -> Float64[Tensor, "m n"]:
        """S times rows, in these coordinates."""
        return torch.from_numpy(self._product(X.numpy().T).T.copy())

    def _product(self, X: Array) -> Array:
        """T times columns."""
        found = self._diagonal[:, None] * X
        found[:-1] += self._beside[:, None] * X[1:]
        found[1:] += self._beside[:, None] * X[:-1]
        return found
