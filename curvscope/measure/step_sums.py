"""What is summed over an approximation's damped steps p = (M + mu I)^{-1} r, over a grid of mu.

In M's eigenbasis p~ = r~ / (s + mu): no solve a value of damping. Whatever needs nothing of G is a sum over the entries
of the weight, in float64. Of G only V^T p is needed, which is taken in the columns' own dtype: K-FAC's and EKFAC's
steps are multiplied with the columns while EKFAC's own pass has them turned into that basis (`FollowedSteps`), so that
no step is turned back; the others are turned back and multiplied with the columns as they are kept (`step_sums`).
float32 leaves up to 1e-6 |V| |p| in V^T p, and so 1e-6 ||G|| |p|^2 in p.Gp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from curvscope.curvature.rotated import Rotated
from curvscope.curvature.tiles import Tile
from curvscope.measure.damped import Damped, ExactSteps, StepSums, mean_ratio, per_length

# Steps that are turned back and multiplied with the columns together take so many bytes.
CHUNK_BYTES = 32 * 2**20
# Entries of the weight that are worked on at a time, over the whole grid: what a core's cache holds.
ENTRIES = 8192

Sums = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Part:
    """A rectangle of the weight in M's eigenbasis.

    Attributes:
        r: the gradient there, of the whole length `size`.
        outside: what of it is outside the span of the columns; None: nothing.
        scale: M's eigenvalues; not needed for the factored form.
        lam_B, lam_A: those of the factors, for the factored form.
    """

    r: Float64[Tensor, "o i"]
    outside: Tensor | None
    size: float
    scale: Tensor | None = None
    lam_B: Tensor | None = None
    lam_A: Tensor | None = None

    def steps(self, shift: Float64[Tensor, " m"], pi: float | None, out: Float[Tensor, "m o i"]) -> Sums:
        """(r.p, p.p, p.Mp, p.r_outside, ||mu p - r||^2, effective dimension); the steps mu p / |r| go to `out`."""
        return self._eigenbasis(shift, out) if pi is None else self._factored(shift, pi, out)

    def _eigenbasis(self, shift: Tensor, out: Tensor) -> Sums:
        assert self.scale is not None
        s, r = self.scale.flatten(), self.r.flatten()
        squares = r.square()
        outside = r * self.outside.flatten() if self.outside is not None else torch.zeros_like(r)
        first = torch.stack([squares, outside, s], 1)
        second = torch.stack([squares, squares * s, squares * s.square()], 1)
        unit = r / self.size
        steps = out.view(shift.numel(), r.numel())
        once = torch.zeros(shift.numel(), 3, dtype=torch.float64, device=r.device)
        twice = torch.zeros_like(once)
        per_shift = shift.reciprocal()[:, None]
        for low in range(0, r.numel(), ENTRIES):
            few = slice(low, low + ENTRIES)
            q = torch.mul(s[few], per_shift).add_(1.0).reciprocal_()  # mu / (s + mu)
            torch.mul(q, unit[few], out=steps[:, few])
            once.addmm_(q, first[few])
            twice.addmm_(q.square_(), second[few])
        rp, outside, dimension = (once * per_shift).unbind(1)
        pp, pMp, distance = (twice * per_shift.square()).unbind(1)
        # mu p - r is -s p, without the cancellation
        return rp, pp, pMp, outside, distance, dimension

    def _factored(self, shift: Tensor, pi: float, out: Tensor) -> Sums:
        """Sums of a separable weighting of r^2 are products with it from both sides."""
        assert self.lam_B is not None and self.lam_A is not None
        b, a, root = self.lam_B, self.lam_A, shift.sqrt()[:, None]
        u, v = pi * root, root / pi
        beta, alpha = (b + v).reciprocal(), (a + u).reciprocal()  # p = beta r alpha
        squares, alpha2, beta2 = self.r.square(), alpha.square(), beta.square()

        def summed(left: Tensor, matrix: Tensor, right: Tensor) -> Tensor:
            return torch.linalg.vecdot(left @ matrix, right)

        # mu p - r = -(b a + u b + v a) p, whose square is (b (a + u) + v a)^2 p^2
        distance = summed(beta2 * b.square(), squares, alpha2 * (a + u).square())
        distance += summed(beta2 * b, squares, 2 * v * alpha2 * a * (a + u))
        distance += summed(beta2, squares, alpha2 * (v * a).square())
        # both sides' weights are at most 1
        torch.mul((v * beta).to(out.dtype)[:, :, None], (self.r / self.size).to(out.dtype), out=out)
        out.mul_((u * alpha).to(out.dtype)[:, None, :])
        return (
            summed(beta, squares, alpha),
            summed(beta2, squares, alpha2),
            summed(beta2 * b, squares, alpha2 * a),
            torch.zeros_like(shift) if self.outside is None else summed(beta, self.r * self.outside, alpha),
            distance,
            (beta * b).sum(1) * (alpha * a).sum(1),
        )


@dataclass
class _Followed:
    """One matrix's sums and V^T (mu p / |r|), as far as the tiles have come."""

    kind: str
    pi: float | None
    sums: Tensor
    products: Tensor


class FollowedSteps:
    """The steps of one K-FAC, in both forms, and of its EKFAC: called with every tile of EKFAC's pass.

    Args:
        exact: the group's exact steps.
        matrix: K-FAC in its eigenbasis.
        shift: mu, [m].
        inputs: d_in with those that the columns leave out.
    """

    def __init__(self, exact: ExactSteps, matrix: Rotated, shift: Float64[Tensor, " m"], inputs: int) -> None:
        assert matrix.lam_A is not None and matrix.lam_B is not None
        self.exact, self.matrix, self.shift = exact, matrix, shift
        self.gradient = matrix.turned(exact.gradient)
        self.outside = None if exact.outside is None else matrix.turned(exact.outside)
        self.size = 1 / float(per_length(exact.gradient.square().sum()))
        pi = mean_ratio(float(matrix.lam_A.sum()), inputs, float(matrix.lam_B.sum()), matrix.lam_B.numel())
        forms = [("kfac", None), ("ekfac", None)] + ([] if pi is None else [("kfac", pi)])
        self.found = [
            _Followed(
                kind,
                ratio,
                torch.zeros(6, shift.numel(), dtype=torch.float64, device=shift.device),
                torch.zeros(shift.numel(), exact.block.total_columns, dtype=torch.float64, device=shift.device),
            )
            for kind, ratio in forms
        ]

    def __call__(self, tile: Tile) -> None:
        """Add the tile's share."""
        assert self.matrix.lam_A is not None and self.matrix.lam_B is not None
        where = (tile.outputs, tile.inputs)
        lam_B, lam_A = self.matrix.lam_B[tile.outputs], self.matrix.lam_A[tile.inputs]
        outside = None if self.outside is None else self.outside[where]
        scales = {"kfac": self.matrix.scale[where], "ekfac": tile.squares}
        every = torch.empty(
            len(self.found), len(self.shift), *self.gradient[where].shape, dtype=tile.dtype, device=self.shift.device
        )
        for one, steps in zip(self.found, every, strict=True):
            part = _Part(self.gradient[where], outside, self.size, scales[one.kind], lam_B, lam_A)
            one.sums += torch.stack(part.steps(self.shift, one.pi, steps))
        # one product for all: the columns are read once
        for one, products in zip(self.found, tile.products(every.flatten(0, 1)).split(len(self.shift)), strict=True):
            one.products += products

    def sums(self) -> Mapping[tuple[str, str], StepSums]:
        """By kfac or ekfac, and form, when all tiles have been seen."""
        return {
            (one.kind, "eigenbasis" if one.pi is None else "factored"): _with_block(
                self.exact, tuple(one.sums), one.products * (self.size / self.shift)[:, None], self.shift
            )
            for one in self.found
        }


def step_sums(
    exact: ExactSteps, matrices: Sequence[Damped], damping: Sequence[Float64[Tensor, " m"]]
) -> list[StepSums]:
    """The sums of every approximation, each over its own grid of damping.

    Turning the steps back costs 2 P (d_out + d_in) flops each, and a pass over the columns, 2 N K P flops a step,
    serves as many as `CHUNK_BYTES` hold; where a column is an outer product its two vectors are turned instead.
    """
    # the forms of a K-FAC and its EKFAC share their basis
    turned: dict[tuple[int, int], tuple[Tensor, Tensor | None]] = {}
    size = 1 / float(per_length(exact.gradient.square().sum()))
    waiting = _Waiting(exact, size)
    for index, (damped, grid) in enumerate(zip(matrices, damping, strict=True)):
        basis = damped.matrix
        key = (id(basis.U_B), id(basis.U_A))
        if key not in turned:
            outside = None if exact.outside is None else basis.turned(exact.outside)
            turned[key] = basis.turned(exact.gradient), outside
        part = _Part(*turned[key], size, basis.scale, basis.lam_B, basis.lam_A)
        for shift in (grid + exact.decay).split(waiting.limit):
            kind = torch.float64 if exact.formed else exact.block.dtype
            steps = torch.empty(shift.numel(), *part.r.shape, dtype=kind, device=shift.device)
            sums = part.steps(shift, damped.pi, steps)
            waiting.add(index, sums, steps, shift, basis)
    return waiting.finished(len(matrices))


class _Waiting:
    """Steps that wait for a pass over the columns."""

    def __init__(self, exact: ExactSteps, size: float) -> None:
        self.exact, self.size = exact, size
        itemsize = 8 if exact.formed else exact.block.dtype.itemsize
        self.limit = max(1, min(CHUNK_BYTES, exact.block.piece_bytes) // (2 * itemsize * exact.block.parameters))
        self.parts: list[tuple[int, Sums, Tensor, Tensor]] = []
        self.done: list[tuple[int, StepSums]] = []

    def add(self, index: int, sums: Sums, steps: Tensor, shift: Tensor, basis: Rotated) -> None:
        """Take a matrix's steps in its basis; those of a basis in which the columns are cheaply turned go at once."""
        block = self.exact.block
        if block.columns.form == "outer":
            self._finish(index, sums, block.project(steps, basis.U_B, basis.U_A), shift)
            return
        self.parts.append((index, sums, _turned_back(steps, basis), shift))
        if sum(part[3].numel() for part in self.parts) >= self.limit:
            self.flush()

    def flush(self) -> None:
        """One pass over the columns for all that waits."""
        if not self.parts:
            return
        joined = torch.cat([steps for _, _, steps, _ in self.parts])
        products = joined.flatten(1) if self.exact.formed else self.exact.block.project(joined)
        for (index, sums, _, shift), each in zip(
            self.parts, products.split([part[3].numel() for part in self.parts]), strict=True
        ):
            self._finish(index, sums, each, shift)
        self.parts = []

    def _finish(self, index: int, sums: Sums, products: Tensor, shift: Tensor) -> None:
        products = products * (self.size / shift)[:, None]
        self.done.append((index, _with_block(self.exact, sums, products, shift)))

    def finished(self, count: int) -> list[StepSums]:
        """The sums of all matrices."""
        self.flush()
        return [_joined([sums for index, sums in self.done if index == one]) for one in range(count)]


def _turned_back(steps: Tensor, basis: Rotated) -> Tensor:
    """The steps in the layer's own axes."""
    steps = steps if basis.U_A is None else steps @ basis.U_A.T.to(steps.dtype)
    return steps if basis.U_B is None else basis.U_B.to(steps.dtype) @ steps


def _with_block(exact: ExactSteps, sums: Sums, products: Tensor, shift: Tensor) -> StepSums:
    """All sums, with p.Gp and p.x from V^T p."""
    rp, pp, pMp, outside, distance, dimension = sums
    pGp, px = exact.against(products, shift)
    # of p.r_outside / mu only the part of p outside the span counts: r_outside is orthogonal to the rest
    px = px + outside / shift
    return StepSums(rp, pp, pGp, pMp, px, distance, dimension)


def _joined(parts: Sequence[StepSums]) -> StepSums:
    """Pieces of a grid one after the other."""
    return StepSums(
        *(torch.cat([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(StepSums))
    )
