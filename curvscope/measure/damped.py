"""Damped steps of one block over a whole grid of damping: the exact ones, and how approximations add their damping.

With r the gradient (weight decay included) and mu = damping + weight decay, the exact step is -(G + mu I)^{-1} r and an
approximation's -(M + mu I)^{-1} r. Signs are left out here: x = (G + mu I)^{-1} r and p = (M + mu I)^{-1} r. Whatever a
row of tables/damping says follows from a few sums over them (`ExactSums`, `StepSums`), which add over groups.

r is V c but for rounding, c the solution of least length of V^T V c = V^T r. Then x = V y, y = (V^T V + mu I)^{-1} c,
and all that is needed of a step p is V^T p: p.G p = |V^T p|^2, p.x = y.V^T p. Factored Tikhonov (arXiv:1503.05671,
section 6.3): (B + sqrt(mu)/pi I) (x) (A + pi sqrt(mu) I), pi^2 = (tr A / d_A) / (tr B / d_B).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.rotated import Rotated


@dataclass(frozen=True)
class ExactSums:
    """Of the exact steps, one entry a value of damping: r.x, x.x, x.Gx, effective dimension; and r.r."""

    rx: Tensor
    xx: Tensor
    xGx: Tensor
    dimension: Tensor
    rr: float

    def __add__(self, other: ExactSums) -> ExactSums:
        """Of two groups together."""
        return ExactSums(
            self.rx + other.rx,
            self.xx + other.xx,
            self.xGx + other.xGx,
            self.dimension + other.dimension,
            self.rr + other.rr,
        )


@dataclass(frozen=True)
class StepSums:
    """Of an approximation's steps, one entry a value of damping.

    r.p, p.p, p.Gp, p.Mp, p.x, the squared distance ||mu p - r||^2 to the plain gradient step, effective dimension.
    """

    rp: Tensor
    pp: Tensor
    pGp: Tensor
    pMp: Tensor
    px: Tensor
    distance: Tensor
    dimension: Tensor

    def __add__(self, other: StepSums) -> StepSums:
        """Of two groups together."""
        return StepSums(
            self.rp + other.rp,
            self.pp + other.pp,
            self.pGp + other.pGp,
            self.pMp + other.pMp,
            self.px + other.px,
            self.distance + other.distance,
            self.dimension + other.dimension,
        )


class ExactSteps:
    """The exact block with the gradient as a combination of its columns.

    Attributes:
        values: g, the numerically nonzero eigenvalues of G (above g_max max(P, N K) eps), ascending.
        gradient: r = gradient + pull, [d_out, d_in] float64.
        outside: what of r is outside the span of the columns, [d_out, d_in]; None where that is rounding.
        residual: share of the gradient itself (without weight decay) outside the span, as measured.
        decay: the weight decay, which adds to every damping, in the unit of the block.
    """

    def __init__(self, block: Block, gradient: Tensor, *, pull: Tensor | None = None, decay: float = 0.0) -> None:
        """`pull` is weight decay times the weights, what it adds to the gradient."""
        self.block = block
        self.decay = decay
        self.formed = block.columns.form == "formed"
        self.solver = block.solver
        self.values = self.solver.values
        gradient = gradient.double()
        # Eigenvectors that were dropped as zero may have carried sqrt(relative) of the gradient; float32 gradients and
        # columns differ by rounding. Neither may be divided by a small damping as if it were real.
        relative = self.solver.relative
        tolerance = 10 * relative**0.5 + (1e4 * torch.finfo(block.dtype).eps if block.dtype != torch.float64 else 0.0)
        self._right, self._start, outside = self._split(gradient)
        size = float(torch.linalg.norm(gradient))
        self.residual = float(torch.linalg.norm(outside)) / size if size > 0 else 0.0
        self.outside = outside if self.residual > tolerance else None
        self.gradient = gradient
        if pull is not None:
            right, start, beyond = self._split(pull.double())
            self._right, self._start = self._right + right, self._start + start
            self.outside = beyond if self.outside is None else self.outside + beyond
            self.gradient = gradient + pull.double()
        if self.values.numel() == block.parameters:
            self.outside = None  # the columns span everything
        self._weights: dict[tuple[float, ...], Tensor] = {}

    def _split(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """V^T X and c with V c ~ X, in the solver's coordinates, and what V c leaves of X.

        Of a formed block, which is its own V^T V: X and X, and what is outside G's range.
        """
        if self.formed:
            inward = self.solver.inward(X.reshape(-1, 1))
            return inward[:, 0], inward[:, 0], X - self.solver.outward(inward).view_as(X)
        # In float64 whatever the columns' dtype is: components along weak directions are small differences.
        inward = self.solver.inward(self.block.project(X.unsqueeze(0), fast=False).T)
        start = self.solver.pseudo(inward[:, 0])
        combined = self.block.combine(self.solver.outward(start.unsqueeze(1))[:, 0])
        return inward[:, 0], start, X - combined

    def inverse(self, X: Float64[Tensor, "d_out d_in"], shift: float) -> Float64[Tensor, "d_out d_in"]:
        """(G + shift I)^{-1} vec(X), by Woodbury: good to eps / shift, which is what the largest results need."""
        if self.formed:
            inward = self.solver.inward(X.reshape(-1, 1))
            weights = inward * (self.values / (shift * (self.values + shift))).unsqueeze(1)
            return X / shift - self.solver.outward(weights).view_as(X)
        return (X - self.block.combine(self.solver.solve(self._products(X), shift))) / shift

    def _products(self, X: Tensor) -> Tensor:
        """V^T X of one X, at unit length in the columns' own dtype, which may be float32."""
        each = per_length(X.square().sum())
        return self.block.project((X * each).unsqueeze(0))[0] / each

    def sums(self, damping: Float64[Tensor, " m"]) -> ExactSums:
        """The exact steps' sums over a grid of damping."""
        shift = damping + self.decay
        step = self.solver.shifted(self._start, shift)
        curved = self.solver.times(step)
        rx, xGx = step @ self._right, torch.linalg.vecdot(curved, step)
        xx = torch.linalg.vecdot(step, step)
        if not self.formed:
            xx, xGx = xGx, torch.linalg.vecdot(curved, curved)
        if self.outside is not None:
            beyond = float(self.outside.square().sum())
            rx, xx = rx + beyond / shift, xx + beyond / shift**2
        rr = float(self.gradient.square().sum())
        return ExactSums(rx, xx, xGx, (self.values / (self.values + shift[:, None])).sum(1), rr)

    def against(self, products: Float64[Tensor, "m n"], shift: Float64[Tensor, " m"]) -> tuple[Tensor, Tensor]:
        """(p.Gp, p.x) of steps p from their V^T p [m, N K] (a formed block: from p itself), shift by shift."""
        weights = self._at(shift)
        px = torch.linalg.vecdot(products, weights)
        if not self.formed:
            return products.square().sum(1), px
        return torch.linalg.vecdot(products @ self.block.gram, products), px

    def _at(self, shift: Tensor) -> Tensor:
        """The exact steps' y [m, N K] (a formed block: x itself), kept for the grids that come again."""
        key = tuple(shift.tolist())
        if key not in self._weights:
            self._weights[key] = self.solver.outward(self.solver.shifted(self._start, shift).T).T.contiguous()
        return self._weights[key]


@dataclass(frozen=True)
class Damped:
    """One approximation with the way damping is added to it: mean ratio pi for the factored form, else None."""

    matrix: Rotated
    pi: float | None = None

    def inverse_scale(self, shift: Float64[Tensor, " m"]) -> Float64[Tensor, "m d_out d_in"]:
        """1 / the damped eigenvalues, over the grid."""
        if self.pi is None:
            return (self.matrix.scale + shift[:, None, None]).reciprocal()
        assert self.matrix.lam_A is not None and self.matrix.lam_B is not None
        root = shift.sqrt()[:, None]
        rows = (self.matrix.lam_B + root / self.pi).reciprocal()
        return rows[:, :, None] * (self.matrix.lam_A + self.pi * root).reciprocal()[:, None, :]


def mean_ratio(A_trace: float, d_A: int, B_trace: float, d_B: int) -> float | None:
    """sqrt((tr A / d_A) / (tr B / d_B)), called pi; None where a factor is zero, so that there is none."""
    if A_trace <= 0 or B_trace <= 0:
        return None
    return ((A_trace / d_A) / (B_trace / d_B)) ** 0.5


def per_length(squares: Tensor) -> Tensor:
    """1 / length; 1 where the length is zero."""
    return torch.where(squares > 0, squares, 1.0).rsqrt()
