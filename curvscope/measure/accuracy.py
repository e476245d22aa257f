"""How far an approximation is from the exact block, without forming either.

`||G - M||^2 = ||G||^2 - 2 <G, M> + ||M||^2` with each term taken in float64. EKFAC and the diagonal are
projections of G, so there <G, M> = ||M||^2.
"""

from __future__ import annotations

import torch

from curvscope.curvature.block import Block
from curvscope.curvature.grouped import GroupedApproximation, GroupedBlock
from curvscope.curvature.kronecker import Approximation
from curvscope.curvature.lanczos import largest_magnitude
from curvscope.curvature.summed import KroneckerSum
from curvscope.extract.plan import PIECES_AT_ONCE
from curvscope.records import NAN, ErrorRow

# The norm formula cancels: below this relative error fewer than five digits are left, so G - M is formed instead.
CANCELLATION = 1e-5
# Columns and factors carry rounding of their own dtype: an error below this many of its units is not told from 0.
ROUNDINGS = 10
FORMED_PARAMETERS = 4096
# G, M and their difference, P x P each, may take this many of the block's slices.
FORMED_PIECES = 8


def error_row(
    layer: str,
    name: str,
    fisher: str,
    block: Block | GroupedBlock,
    approximation: Approximation | GroupedApproximation | KroneckerSum,
    *,
    inner: float,
    spectral: bool,
    seed: int,
    reason: str = "",
) -> ErrorRow:
    """tables/errors for one approximation of one exact block (the columns are defined at `ErrorRow`).

    `inner` is <G, M>, for which the caller has cheaper ways than a formula that serves all.
    A zero block has no relative error: the row is not_assessed. A zero approximation has error 1, trace ratio 0 and no
    cosine. Where the norm formula cancels, G - M is formed if P <= 4096 and memory allows it, else the error is said to
    be below 1e-5. Where it is no larger than what rounding of the columns leaves, the reason says so.
    """
    if block.norm == 0.0:
        return ErrorRow(
            layer,
            name,
            fisher,
            status="not_assessed",
            reason="the exact block is zero on this batch: no curvature reaches the layer",
        )
    notes = [reason] if reason else []
    status = "ok"
    cosine = inner / (block.norm * approximation.norm) if approximation.norm > 0 else NAN
    if approximation.norm == 0:
        notes.append("the approximation is zero, so it has no direction")
    squared = block.norm**2 - 2 * inner + approximation.norm**2
    relative = max(squared, 0.0) ** 0.5 / block.norm
    if relative < CANCELLATION:
        room = FORMED_PIECES * block.piece_bytes >= 24 * block.parameters**2
        if block.parameters <= FORMED_PARAMETERS and room:
            relative = float(torch.linalg.norm(block.dense() - approximation.dense())) / block.norm
            if relative < ROUNDINGS * torch.finfo(block.dtype).eps:
                notes.append(
                    f"rel_frobenius is rounding of {str(block.dtype).removeprefix('torch.')}: 0 as far as known"
                )
        else:
            relative, status = NAN, "not_assessed"
            notes.append("rel_frobenius is below 1e-5, where the norm formula has no digits left")
    rel_spectral = NAN
    if spectral:
        # An eigenvalue is off by the square of its residual; float32 columns carry 1e-7 themselves.
        tolerance = 1e-9 if block.dtype == torch.float64 else 1e-3
        extreme = largest_magnitude(
            lambda X: block.matvec(X) - approximation.matvec(X),
            (block.d_out, block.d_in),
            device=block.device,
            start=_start(block, seed),
            tolerance=tolerance,
            basis_bytes=PIECES_AT_ONCE * block.piece_bytes,
        )
        top = float(block.eigenvalues[0])
        rel_spectral = abs(extreme.value) / top
        if not extreme.converged:
            status = "not_converged"
            notes.append(f"rel_spectral: residual {extreme.residual / top:.1e} after {extreme.steps} Lanczos steps")
    return ErrorRow(
        layer,
        name,
        fisher,
        rel_frobenius=relative,
        cosine=cosine,
        trace_ratio=approximation.trace / block.trace,
        rel_spectral=rel_spectral,
        status=status,
        reason="; ".join(notes),
    )


def _start(block: Block | GroupedBlock, seed: int) -> torch.Tensor:
    """A first Lanczos vector with weight on G's leading direction and, as it may not be the difference's, on noise."""
    device = block.device
    generator = torch.Generator(device=device).manual_seed(seed)
    noise = torch.randn(block.d_out, block.d_in, dtype=torch.float64, device=device, generator=generator)
    leading = block.matvec(noise)
    size = torch.linalg.norm(leading)
    return noise / torch.linalg.norm(noise) + (leading / size if float(size) > 0 else 0.0)
