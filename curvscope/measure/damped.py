"""Damped steps of one block over a whole grid of damping, from one eigendecomposition of each matrix.

With r the gradient (weight decay included) and mu = damping + weight decay, the exact step is -(G + mu I)^{-1} r and an
approximation's -(M + mu I)^{-1} r. Signs are left out here: x = (G + mu I)^{-1} r and p = (M + mu I)^{-1} r. Whatever a
row of tables/damping says follows from a few sums over them (`ExactSums`, `StepSums`), which add over groups.

In the eigenbasis of M, p~ = r~ / (s + mu): no solve a value of damping. G's eigenvectors are u_i = V q_i / sqrt(g_i)
with the eigenpairs of V^T V, so all that is needed of p is V^T p. Factored Tikhonov (arXiv:1503.05671, section 6.3):
(B + sqrt(mu)/pi I) (x) (A + pi sqrt(mu) I), pi^2 = (tr A / d_A) / (tr B / d_B).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.rotated import Rotated

# Steps of so many bytes are worked on at a time, or of one of the block's slices where these are smaller.
CHUNK_BYTES = 96 * 2**20


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
    """The exact block with the gradient split along its eigenvectors.

    Attributes:
        values: g, the numerically nonzero eigenvalues of G (above g_max max(P, N K) eps), [rank].
        gradient: r = gradient + pull, [d_out, d_in] float64.
        along: u_i . r, [rank].
        outside: what of r is outside the span of the columns, [d_out, d_in]; None where that is rounding.
        residual: share of the gradient itself (without weight decay) outside the span, as measured.
        decay: the weight decay, which adds to every damping, in the unit of the block.
    """

    def __init__(self, block: Block, gradient: Tensor, *, pull: Tensor | None = None, decay: float = 0.0) -> None:
        """`pull` is weight decay times the weights, what it adds to the gradient."""
        self.block = block
        self.decay = decay
        values, vectors = block.eigenpairs
        eps = torch.finfo(torch.float64).eps
        relative = max(block.parameters, block.total_columns) * eps
        kept = values > max(float(values[-1]), 0.0) * relative
        self.values = values[kept]
        self._vectors = vectors[:, kept]
        gradient = gradient.double()
        # Eigenvectors that were dropped as zero may have carried sqrt(relative) of the gradient; float32 gradients and
        # columns differ by rounding. Neither may be divided by a small damping as if it were real.
        tolerance = 10 * relative**0.5 + (1e4 * torch.finfo(block.dtype).eps if block.dtype != torch.float64 else 0.0)
        self.along, outside = self._split(gradient)
        size = float(torch.linalg.norm(gradient))
        self.residual = float(torch.linalg.norm(outside)) / size if size > 0 else 0.0
        self.outside = outside if self.residual > tolerance else None
        self.gradient = gradient
        if pull is not None:
            along, beyond = self._split(pull.double())
            self.along = self.along + along
            self.outside = beyond if self.outside is None else self.outside + beyond
            self.gradient = gradient + pull.double()
        if self.values.numel() == block.parameters:
            self.outside = None  # the columns span everything

    def _split(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """The components of X along the eigenvectors, and what is left of it."""
        # In float64 whatever the columns' dtype is: components along weak directions are small differences.
        along = self.coordinates(X.unsqueeze(0), fast=False)[0]
        if self.block.columns.form == "formed":
            inside = (self._vectors @ along).view_as(X)
        else:
            inside = self.block.combine(self._vectors @ (along / self.values.sqrt()))
        return along, X - inside

    def coordinates(
        self,
        X: Float64[Tensor, "m d_out d_in"],
        U_B: Tensor | None = None,
        U_A: Tensor | None = None,
        *,
        fast: bool = True,
    ) -> Float64[Tensor, "m rank"]:
        """u_i . vec(U_B X U_A^T) of several X; with `fast` multiplied in the columns' own dtype."""
        if self.block.columns.form == "formed":
            X = X if U_A is None else X @ U_A.T
            X = X if U_B is None else U_B @ X
            return X.flatten(1) @ self._vectors
        # unit length before the columns' own dtype, which may be float32
        each = _per_length(X.flatten(1).square().sum(1))
        return self.of_unit(X * each[:, None, None], U_B, U_A, fast=fast) / each[:, None]

    def of_unit(
        self, X: Tensor, U_B: Tensor | None = None, U_A: Tensor | None = None, *, fast: bool = True
    ) -> Float64[Tensor, "m rank"]:
        """`coordinates` of X whose size suits the columns' dtype; columns that are kept, not formed."""
        return (self.block.project(X, U_B, U_A, fast=fast) @ self._vectors) / self.values.sqrt()

    def inverse(self, X: Float64[Tensor, "d_out d_in"], shift: float) -> Float64[Tensor, "d_out d_in"]:
        """(G + shift I)^{-1} vec(X), by Woodbury: good to eps / shift, which is what the largest results need."""
        along = self.coordinates(X.unsqueeze(0))[0]
        weights = along * self.values / (shift * (self.values + shift))
        if self.block.columns.form == "formed":
            return X / shift - (self._vectors @ weights).view_as(X)
        return X / shift - self.block.combine(self._vectors @ (weights / self.values.sqrt()))

    def sums(self, damping: Float64[Tensor, " m"]) -> ExactSums:
        """The exact steps' sums over a grid of damping."""
        shift = damping[:, None] + self.decay
        step = self.along / (self.values + shift)
        rx, xx, xGx = step @ self.along, step.square().sum(1), step.square() @ self.values
        if self.outside is not None:
            beyond = float(self.outside.square().sum())
            rx, xx = rx + beyond / shift[:, 0], xx + beyond / shift[:, 0] ** 2
        rr = float(self.gradient.square().sum())
        return ExactSums(rx, xx, xGx, (self.values / (self.values + shift)).sum(1), rr)


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


@dataclass
class _Part:
    """A matrix's steps over a piece of its grid: p in M's basis, then what is left to know of it."""

    matrix: int
    sums: StepSums
    shift: Tensor
    steps: Tensor | None
    along: Tensor | None = None


def step_sums(
    exact: ExactSteps, matrices: Sequence[Damped], damping: Sequence[Float64[Tensor, " m"]]
) -> list[StepSums]:
    """The sums of every approximation, each over its own grid of damping.

    Elementwise work in float64 in M's own basis. Beyond that one pass over the columns serves all steps together
    (2 N K P flops each), and turning them back costs 2 P (d_out + d_in) flops each; where a column is an outer product
    its two vectors are turned instead.
    """
    parts: list[_Part] = []
    waiting: list[_Part] = []
    # the forms of a K-FAC and its EKFAC share their basis
    turned: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
    chunk = min(CHUNK_BYTES, exact.block.piece_bytes)
    limit = max(1, chunk // (32 * exact.block.parameters))
    for index, (damped, grid) in enumerate(zip(matrices, damping, strict=True)):
        basis = damped.matrix
        key = (id(basis.U_B), id(basis.U_A))
        if key not in turned:
            outside = None if exact.outside is None else basis.turned(exact.outside)
            turned[key] = basis.turned(exact.gradient), outside
        gradient, outside = turned[key]
        for values in grid.split(limit):
            part = _in_eigenbasis(index, damped, gradient, outside, values + exact.decay)
            parts.append(part)
            assert part.steps is not None
            if exact.block.columns.form in ("outer", "formed"):
                part.along = exact.coordinates(part.steps, basis.U_B, basis.U_A)
                part.steps = None
                continue
            part.steps = _turned_back(part.steps, part.sums.pp, basis, exact.block.dtype)
            waiting.append(part)
            if sum(one.steps.nbytes for one in waiting if one.steps is not None) > chunk:
                _project(exact, waiting)
                waiting = []
    _project(exact, waiting)
    return [
        _joined([_with_block(exact, part) for part in parts if part.matrix == index]) for index in range(len(matrices))
    ]


def _in_eigenbasis(index: int, damped: Damped, gradient: Tensor, outside: Tensor | None, shift: Tensor) -> _Part:
    """The steps and every sum that needs nothing of G; p.x as far as it comes from outside the span."""
    scale = damped.matrix.scale.flatten()
    inverse = damped.inverse_scale(shift).flatten(1)
    r = gradient.flatten()
    dimension = inverse @ scale
    p = inverse.mul_(r)
    curved = p * scale
    pMp = torch.linalg.vecdot(curved, p)
    # mu p - r; in the eigenbasis form that is -s p, without the cancellation
    beyond = curved if damped.pi is None else torch.addcmul(-r, p, shift[:, None])
    sums = StepSums(
        rp=p @ r,
        pp=torch.linalg.vecdot(p, p),
        pGp=torch.zeros_like(shift),
        pMp=pMp,
        px=torch.zeros_like(shift) if outside is None else (p @ outside.flatten()) / shift,
        distance=torch.linalg.vecdot(beyond, beyond),
        dimension=dimension,
    )
    return _Part(index, sums, shift, p.view(-1, *gradient.shape))


def _turned_back(steps: Tensor, squares: Tensor, basis: Rotated, dtype: torch.dtype) -> Tensor:
    """The steps at unit length in the layer's own axes, in the columns' own dtype."""
    unit = (steps * _per_length(squares)[:, None, None]).to(dtype)
    unit = unit if basis.U_A is None else unit @ basis.U_A.T.to(dtype)
    return unit if basis.U_B is None else basis.U_B.to(dtype) @ unit


def _per_length(squares: Tensor) -> Tensor:
    """1 / length; 1 for steps of length zero."""
    return torch.where(squares > 0, squares, 1.0).rsqrt()


def _project(exact: ExactSteps, waiting: Sequence[_Part]) -> None:
    """Give every waiting part its components along G's eigenvectors, in one pass over the columns."""
    if not waiting:
        return
    steps = torch.cat([part.steps for part in waiting if part.steps is not None])
    lengths = torch.cat([part.sums.pp for part in waiting])
    along = exact.of_unit(steps) / _per_length(lengths)[:, None]
    for part, piece in zip(waiting, along.split([part.shift.numel() for part in waiting]), strict=True):
        part.along, part.steps = piece, None


def _with_block(exact: ExactSteps, part: _Part) -> StepSums:
    """The part's sums with p.Gp and p.x filled in."""
    assert part.along is not None
    step = exact.along / (exact.values + part.shift[:, None])
    px = torch.linalg.vecdot(part.along, step)
    if exact.outside is not None:
        # of p.r_outside / mu only the part of p outside the span counts: r_outside is orthogonal to the rest
        px = px + part.sums.px
    return dataclasses.replace(part.sums, pGp=part.along.square() @ exact.values, px=px)


def _joined(parts: Sequence[StepSums]) -> StepSums:
    """Pieces of a grid one after the other."""
    return StepSums(*(torch.cat(each) for each in zip(*(vars(part).values() for part in parts), strict=True)))
