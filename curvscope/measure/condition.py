"""How well an approximation preconditions the block: the condition of (M + mu)^{-1/2} (G + mu) (M + mu)^{-1/2}."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvscope.curvature.lanczos import Extreme, largest_magnitude
from curvscope.extract.plan import PIECES_AT_ONCE
from curvscope.measure.damped import Damped, ExactSteps

TOLERANCE = 1e-3
STEPS = 100
# As a rule so many Lanczos steps are taken, for both ends together.
EXPECTED_STEPS = 60


def preconditioned_condition(
    blocks: Sequence[ExactSteps], matrices: Sequence[Damped], damping: float, *, seed: int
) -> tuple[float, str]:
    """Largest over smallest eigenvalue of the preconditioned damped block, and a remark (empty: converged).

    Both ends are largest eigenvalues, the lower one of the inverse (M + mu)^{1/2} (G + mu)^{-1} (M + mu)^{1/2}, by
    Lanczos to a relative residual of 1e-3, which leaves 1e-6 in an isolated eigenvalue. Groups count together.
    """
    highest, lowest, remark = 0.0, 0.0, ""
    for exact, damped in zip(blocks, matrices, strict=True):
        top, bottom = _extremes(exact, damped, damping, seed)
        highest, lowest = max(highest, top.value), max(lowest, bottom.value)
        if not (top.converged and bottom.converged):
            residual = max(top.residual / abs(top.value), bottom.residual / abs(bottom.value))
            remark = f"condition: residual {residual:.1e} after {max(top.steps, bottom.steps)} Lanczos steps"
    return highest * lowest, remark


def flops(exact: ExactSteps) -> float:
    """About what one approximation's condition costs at one damping."""
    block = exact.block
    each = 4.0 * block.total_columns * block.parameters
    if block.columns.form in ("outer", "factored"):
        assert block.columns.inputs is not None
        each = 4.0 * block.columns.examples * block.columns.inputs.shape[1] * block.parameters
    turns = 4.0 * block.parameters * (block.d_out + block.d_in)
    return EXPECTED_STEPS * (each + turns)


def _extremes(exact: ExactSteps, damped: Damped, damping: float, seed: int) -> tuple[Extreme, Extreme]:
    """The largest eigenpairs of the preconditioned block and of its inverse, in M's basis."""
    shift = damping + exact.decay
    basis = damped.matrix
    root = damped.inverse_scale(torch.tensor([shift], dtype=torch.float64, device=exact.block.device))[0].sqrt()

    def back(X: Tensor) -> Tensor:
        X = X if basis.U_A is None else X @ basis.U_A.T
        return X if basis.U_B is None else basis.U_B @ X

    def block(X: Tensor) -> Tensor:
        Y = back(root * X)
        return root * basis.turned(exact.block.matvec(Y) + shift * Y)

    def inverse(X: Tensor) -> Tensor:
        return basis.turned(exact.inverse(back(X / root), shift)) / root

    def largest(operator: Callable[[Tensor], Tensor]) -> Extreme:
        shape, device = (exact.block.d_out, exact.block.d_in), exact.block.device
        return largest_magnitude(
            operator,
            shape,
            device=device,
            seed=seed,
            tolerance=TOLERANCE,
            max_steps=STEPS,
            basis_bytes=PIECES_AT_ONCE * exact.block.piece_bytes,
        )

    return largest(block), largest(inverse)
