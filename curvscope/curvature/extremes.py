"""Both ends of a symmetric operator's spectrum, by Lanczos with full reorthogonalization and thick restarts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.curvature.eigen import eigh
from curvscope.errors import AnalysisError

LEAST_BASIS = 12


@dataclass(frozen=True)
class Pair:
    """One eigenpair: value, unit vector, residual norm ||Mx - lambda x||, and whether that is within the tolerance.

    Where it is not, a value at the upper end is still a lower bound of the largest eigenvalue (a Rayleigh quotient),
    and one at the lower end an upper bound of the smallest.
    """

    value: float
    vector: Tensor
    residual: float
    converged: bool


@dataclass(frozen=True)
class Extremes:
    """The largest eigenpairs, descending, and the smallest, ascending, with the products that were taken."""

    top: list[Pair]
    bottom: list[Pair]
    products: int


def extremes(
    matvec: Callable[[Float64[Tensor, " n"]], Float64[Tensor, " n"]],
    size: int,
    *,
    top: int = 1,
    bottom: int = 0,
    device: torch.device | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    tolerance: float = 1e-6,
    max_products: int = 100,
    basis_bytes: int = 256 * 2**20,
    deadline: float = float("inf"),
) -> Extremes:
    """The `top` largest and `bottom` smallest eigenpairs, the algebraic order deciding, float64.

    The iteration ends when all of the `top` have residuals below `tolerance` times the largest |eigenvalue| seen, when
    the Krylov space is exhausted, after `max_products`, or at `deadline` (time.monotonic); `bottom` is what the same
    space gives, with its own residuals. A basis that would exceed `basis_bytes` is restarted from the Ritz
    vectors of both ends. Of a repeated eigenvalue one copy is found.

    Raises:
        AnalysisError: a product is not finite.

    Source: thick restart, Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000).
    """
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(size, dtype=torch.float64, generator=generator) if start is None else start.detach().double()
    vector = vector.to(device or vector.device).reshape(-1)
    if not float(vector.norm()) > 0:
        vector = torch.ones_like(vector)
    vector = vector / vector.norm()
    rows = min(size, max_products, max(LEAST_BASIS + top + bottom, basis_bytes // (8 * size)))
    basis = torch.empty(rows, size, dtype=torch.float64, device=vector.device)
    projected = torch.zeros(rows, rows, dtype=torch.float64)
    filled = products = 0
    while True:
        basis[filled] = vector
        image = matvec(vector).reshape(-1)
        if not bool(image.isfinite().all()):
            raise AnalysisError(
                "A product with the matrix is NaN or infinite.",
                where=f"operator on {size} numbers, product {products + 1}",
                remedy="Look for a function without a second derivative at this point (sqrt or norm of 0).",
            )
        products += 1
        known = basis[: filled + 1]
        overlaps = known @ image
        image = image - overlaps @ known
        image = image - (known @ image) @ known  # twice is enough (Parlett)
        projected[filled, : filled + 1] = projected[: filled + 1, filled] = overlaps.cpu()
        filled += 1
        beta = float(image.norm())
        values, weights = eigh(projected[:filled, :filled])
        residuals = (beta * weights[-1]).abs()
        scale = max(float(values.abs().max()), 1e-300)
        wanted = list(range(filled - 1, max(filled - 1 - top, -1), -1))
        lowest = list(range(min(bottom, filled)))
        exhausted = beta <= 1e-13 * scale or filled == size
        done = filled >= top and all(float(residuals[i]) <= tolerance * scale for i in wanted)
        if exhausted or done or products >= max_products or time.monotonic() > deadline:
            break
        if filled == rows:
            keep = [*range(bottom), *range(filled - max(top + 2, rows // 3), filled)]
            basis[: len(keep)] = weights[:, keep].T.to(basis) @ known
            projected.zero_()
            projected[: len(keep), : len(keep)] = torch.diag(values[keep])
            filled = len(keep)
        vector = image / beta

    def pair(index: int) -> Pair:
        residual = 0.0 if exhausted else float(residuals[index])
        ritz = weights[:, index].to(basis) @ known
        return Pair(float(values[index]), ritz / ritz.norm(), residual, residual <= tolerance * scale)

    return Extremes([pair(i) for i in wanted], [pair(i) for i in lowest], products)
