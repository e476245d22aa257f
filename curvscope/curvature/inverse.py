"""Damped inverses `(M + lam I)^{-1}` of one layer's curvature, for any number of dampings from one eigendecomposition.

M is B (x) A, EKFAC in the eigenbasis of B (x) A, or the exact block. Damping of a Kronecker product is `eigenbasis`,
`B (x) A + lam I`, or `factored`, `(B + sqrt(lam)/pi I) (x) (A + pi sqrt(lam) I)` with
`pi = sqrt((tr A / d_A) / (tr B / d_B))` (arXiv:1503.05671, section 6.3).

Everything runs in float64. Factors and blocks are positive semidefinite: eigenvalues that rounding left below zero are
taken as zero here, and `noise` says how large they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.kronecker import Kronecker


@dataclass(frozen=True)
class KroneckerInverse:
    """The inverses of one Kronecker product and of its EKFAC, applied to one right side R [d_out, d_in].

    Attributes:
        lam_A, lam_B: the factors' eigenvalues, those below zero taken as zero.
        U_A, U_B: their eigenvectors.
        rotated: `U_B^T R U_A`.
        corrected: EKFAC's diagonal [d_out, d_in] in this basis, or None.
        noise: the largest product of eigenvalues that was below zero, as a positive number.
        inputs: d_in with the inputs that are left out because A is zero there (tokens that do not occur).
    """

    lam_A: Tensor
    U_A: Tensor
    lam_B: Tensor
    U_B: Tensor
    rotated: Tensor
    corrected: Tensor | None
    noise: float
    inputs: int

    @classmethod
    def of(
        cls,
        kronecker: Kronecker,
        corrected: Tensor | None,
        *,
        right: Float64[Tensor, "d_out d_in"],
        scale: float,
        inputs: int | None = None,
    ) -> KroneckerInverse:
        """From a product whose B (and the corrected diagonal) are to be multiplied with `scale`."""
        lam_A, U_A, lam_B, U_B = kronecker.bases
        lam_B = lam_B * scale
        corners = torch.outer(lam_B[[0, -1]], lam_A[[0, -1]])
        return cls(
            lam_A.clamp(min=0.0),
            U_A,
            lam_B.clamp(min=0.0),
            U_B,
            U_B.T @ right @ U_A,
            None if corrected is None else corrected * scale,
            max(0.0, -float(corners.min())),
            inputs or lam_A.numel(),
        )

    @cached_property
    def pi(self) -> float | None:
        """The balance of factored damping; None where a factor is zero."""
        mean_A, mean_B = float(self.lam_A.sum()) / self.inputs, float(self.lam_B.mean())
        return (mean_A / mean_B) ** 0.5 if mean_A > 0 and mean_B > 0 else None

    def eigenvalues(self, *, ekfac: bool = False) -> Float64[Tensor, "d_out d_in"]:
        """Those of M, as a matrix in the eigenbasis."""
        if ekfac:
            assert self.corrected is not None
            return self.corrected
        return torch.outer(self.lam_B, self.lam_A)

    def apply(self, damping: float, *, ekfac: bool = False, factored: bool = False) -> Float64[Tensor, "d_out d_in"]:
        """`(M + damping I)^{-1} R`; factored damping of a product with a zero factor falls back to the eigenbasis."""
        if factored and not ekfac and self.pi is not None:
            root = damping**0.5
            divisor = torch.outer(self.lam_B + root / self.pi, self.lam_A + self.pi * root)
        else:
            divisor = self.eigenvalues(ekfac=ekfac) + damping
        return self.U_B @ (self.rotated / divisor) @ self.U_A.T

    def apply_outside(
        self, right: Float64[Tensor, "d_out rest"], damping: float, *, factored: bool = False
    ) -> Float64[Tensor, "d_out rest"]:
        """The same for the right side at inputs that are left out: A is zero there, and so is EKFAC's diagonal."""
        if not factored or self.pi is None:
            return right / damping
        root = damping**0.5
        divisor = (self.lam_B + root / self.pi) * (self.pi * root)
        return self.U_B @ ((self.U_B.T @ right) / divisor.unsqueeze(1))


def exact_inverses(
    block: Block,
    gradient: Float64[Tensor, "d_out d_in"],
    decay: Float64[Tensor, "d_out d_in"],
    dampings: Sequence[float],
    *,
    scale: float,
    eps: float,
) -> Float64[Tensor, "m d_out d_in"]:
    """`(scale G + lam I)^{-1} (gradient + decay)` for each lam, [m, d_out, d_in].

    With c the solution of least length of `V^T V c = V^T R` the part of the right side in the span of V is
    `V (scale V^T V + lam)^{-1} c`, which has no division by lam; what is outside the span is divided by lam. Of the
    gradient, the part outside the span is dropped where it is rounding (relative size below sqrt(P) eps, eps that of
    the run): for softmax and squared errors the gradient lies in the span, and a division by lam would let its
    rounding grow.
    """
    solver, sides = block.solver, torch.stack([gradient, decay])
    if block.columns.form == "formed":
        starts = solver.inward(sides.flatten(1).T).T  # coefficients of unit eigenvectors of G, [2, rank]

        def spanned(coordinates: Tensor) -> Tensor:
            return solver.outward(coordinates.T).T.unflatten(1, (block.d_out, block.d_in))
    else:
        products = solver.inward(block.project(sides, fast=False).T)
        starts = torch.stack([solver.pseudo(one) for one in products.unbind(1)])

        def spanned(coordinates: Tensor) -> Tensor:
            return block.combinations(solver.outward(coordinates.T))

    outside = sides - spanned(starts)
    bound = block.parameters**0.5 * 10 * eps * float(torch.linalg.norm(gradient))
    if float(torch.linalg.norm(outside[0])) <= bound:
        outside[0] = 0.0
    lams = torch.tensor(list(dampings), dtype=torch.float64, device=sides.device)
    inside = spanned(solver.shifted(starts.sum(0), lams / scale) / scale)
    return inside + outside.sum(0) / lams.view(-1, 1, 1)


@lru_cache(maxsize=256)
def between(damping: float, nodes: tuple[float, ...]) -> tuple[tuple[float, ...], float]:
    """Weights w with `(G + damping I)^{-1} ~ sum_j w_j (G + node_j I)^{-1}` for every positive semidefinite G.

    They are the least squares solution of `1 = (s + damping) sum_j w_j / (s + node_j)` over eigenvalues s from zero to
    far beyond the nodes. The second value is the largest deviation found, which bounds the relative error of the
    inverse in each eigendirection: 1e-3 inside a range of nodes half a decade apart, under 1e-2 at its ends.
    """
    places = torch.tensor(nodes, dtype=torch.float64)
    low, high = float(places.min().log10()), float(places.max().log10())
    s = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(low - 3, high + 6, 400, dtype=torch.float64)])
    matrix = (s.unsqueeze(1) + damping) / (s.unsqueeze(1) + places)
    wanted = torch.ones(len(s), 1, dtype=torch.float64)
    weights = torch.linalg.lstsq(matrix, wanted, driver="gelsd").solution
    return tuple(weights.flatten().tolist()), float((matrix @ weights - wanted).abs().max())
