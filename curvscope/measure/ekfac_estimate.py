"""EKFAC's error from draws: its eigenbasis from some of them, its diagonal there from others.

For any fixed orthonormal basis U = U_B (x) U_A and Lambda = diag(U^T G U), `||G - EKFAC||^2 = ||G||^2 - ||Lambda||^2`.
With Lambda from the draws that made U, its largest entries would be the draws' own noise. So the draws are halved: the
basis of each half's B serves the diagonal of the other half, in which pairs of different draws give <Lambda, Lambda>
without bias; the two results are averaged. What is estimated is thus the error of EKFAC in bases that K/2 draws give,
a little larger than in that of the exact B. Where B is exact (no draw is in it) so is the basis, and all pairs count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.eigen import eigh
from curvscope.measure.draws import block_pairs, diagonal_pairs, rotated, some_draws
from curvscope.measure.jackknife import MINIMUM_FOLD

MINIMUM_DRAWS = 2 * MINIMUM_FOLD


def halves(draws: int) -> list[list[int]]:
    """Every second draw, and the others."""
    return [list(range(0, draws, 2)), list(range(1, draws, 2))]


def ekfac_pairs(
    block: Block,
    A: Float64[Tensor, "d_in d_in"],
    B_draws: Float64[Tensor, "K d_out d_out"],
    folds: Sequence[Sequence[int]],
) -> tuple[Float64[Tensor, "K K"], Float64[Tensor, "K K"]]:
    """<G_i, G_j> and <Lambda_i, Lambda_j> for i and j of one fold, zero elsewhere.

    `B_draws` are the factors of single draws. A fold's Lambda lie in the eigenbasis of A and the mean B of the draws
    that are not in it; of all draws where there is one fold (then B must be exact).
    """
    draws = block.columns.count
    products = block_pairs(block)[0]
    diagonals = torch.zeros_like(products)
    U_A = eigh(A)[1]
    for fold in folds:
        others = sorted(set(range(draws)) - set(fold)) or list(fold)
        U_B = eigh(B_draws[others].mean(0))[1]
        index = torch.tensor(list(fold), device=products.device)
        part = some_draws(block, fold)
        diagonals[index[:, None], index] = diagonal_pairs(rotated(part, U_B, U_A))
    return products, diagonals
