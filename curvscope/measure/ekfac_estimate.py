"""EKFAC's error from draws: its eigenbasis from some of them, its diagonal there from others.

For any fixed orthonormal basis U = U_B (x) U_A and Lambda = diag(U^T G U), `||G - EKFAC||^2 = ||G||^2 - ||Lambda||^2`.
With Lambda from the draws that made U, its largest entries would be the draws' own noise. So the draws are halved: the
basis of each half's B serves the diagonal of the other half, in which pairs of different draws give <Lambda, Lambda>
without bias; the two results are averaged. Where B is exact (no draw is in it) so is the basis, and all pairs count.

The basis of k draws is not that of the exact B. It errs twice. Other draws would have given another basis: what
<Lambda, Lambda> changes by without each of the draws in turn is theirs in the jackknife, beside what they change as
draws of the diagonal (first-order changes: the basis is no maximum of ||Lambda||). And ||Lambda|| is smaller in it, by
1/k where k is large, more slowly where it is not. The bases of half as many draws tell how much: <Lambda, Lambda> is
carried on along 1/k, and where it ends is in doubt by `DOUBT` times the change that one halving made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.eigen import eigh
from curvscope.measure.draws import Turned
from curvscope.measure.jackknife import MINIMUM_FOLD

MINIMUM_DRAWS = 2 * MINIMUM_FOLD
# Bases that leave out one draw, or one group of them, of each half.
MOST_BASES = 8
# Standard errors of the basis, in units of what halving its draws changes.
DOUBT = 2.0


@dataclass(frozen=True)
class LambdaPairs:
    """<Lambda_i, Lambda_j> [K, K] for draws i and j of one fold, zero elsewhere.

    `given` lie in the bases that the draws outside the fold give, `settled` are carried on to that of all draws there
    could be, and `doubt` is how far that may be off (a standard error). `moved` is what the folds' mean over pairs of
    different draws changes by where one draw is left out of the basis that it helped to make, less the mean of these
    changes over the basis's draws. Where B is exact the last three are `given` and zeros.
    """

    given: Float64[Tensor, "K K"]
    settled: Float64[Tensor, "K K"]
    doubt: Float64[Tensor, "K K"]
    moved: Float64[Tensor, " K"]


def halves(draws: int) -> list[list[int]]:
    """Every second draw, and the others."""
    return [list(range(0, draws, 2)), list(range(1, draws, 2))]


def ekfac_pairs(
    block: Block,
    A: Float64[Tensor, "d_in d_in"],
    B_draws: Float64[Tensor, "K d_out d_out"],
    folds: Sequence[Sequence[int]],
) -> LambdaPairs:
    """The products of single draws' Lambda, `B_draws` being the factors of single draws.

    A fold's Lambda lie in the eigenbasis of A and the mean B of the draws that are not in it; of all draws where there
    is one fold (then B must be exact).
    """
    draws = block.columns.count
    given = torch.zeros(draws, draws, dtype=torch.float64, device=block.device)
    change, moved = torch.zeros_like(given), torch.zeros_like(given[0])
    turned = Turned(block, eigh(A)[1])
    weight = 0.0
    for fold in folds:
        others = sorted(set(range(draws)) - set(fold))
        index = torch.tensor(list(fold), device=block.device)

        def products(basis: Sequence[int], fold: Sequence[int] = fold) -> Tensor:
            return turned.pairs(fold, eigh(B_draws[list(basis)].mean(0))[1])

        given[index[:, None], index] = mine = products(others or fold)
        if others:
            fewer = len(others) // 2
            parts = [products(some) for some in (others[:fewer], others[-fewer:])]
            change[index[:, None], index] = mine - (parts[0] + parts[1]) / 2
            weight = fewer / (len(others) - fewer)
            for some in _groups(others):
                left = _different(products([j for j in others if j not in some])) - _different(mine)
                # of a group's draws each gets what makes the jackknife's variance that of the group
                moved[some] = left * (len(others) - len(some)) / ((len(others) - 1) * len(some) ** 0.5)
            moved[others] = (moved[others] - moved[others].mean()) / len(folds)
    return LambdaPairs(given, given + weight * change, DOUBT * change, moved)


def _groups(draws: Sequence[int]) -> list[list[int]]:
    """The draws one by one, or in at most MOST_BASES groups: each costs a basis."""
    size = -(-len(draws) // MOST_BASES)
    return [list(draws[i : i + size]) for i in range(0, len(draws), size)]


def _different(pairs: Float64[Tensor, "m m"]) -> Tensor:
    """The mean over pairs of different draws."""
    m = pairs.shape[0]
    return (pairs.sum() - pairs.diagonal().sum()) / (m * (m - 1))
