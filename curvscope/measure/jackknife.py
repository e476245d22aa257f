"""Unbiased means over pairs of draws, and the delete-one-draw jackknife of numbers made from them.

Draws X_1 ... X_K with inner products `pairs[i, j] = <X_i, Y_j>` estimate <E X, E Y> without bias by the mean over
i != j (a U-statistic). Draws may come in folds, of which only pairs of the same fold are taken; folds count equally.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.records import NAN

# Fewer draws an fold leave no pair when one is deleted.
MINIMUM_FOLD = 3


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error; both NaN where the draws do not determine it."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Sums:
    """Unbiased estimates of several sums: from all draws, and with each draw left out in turn.

    Attributes:
        whole: [q].
        without: [K, q], row i without draw i.
        folds: the draws of each fold.
    """

    whole: Float64[Tensor, " q"]
    without: Float64[Tensor, "K q"]
    folds: Sequence[Sequence[int]]

    def of(self, number: Callable[[Tensor], Tensor]) -> Estimate:
        """A number made of the sums, [..., q] -> [...], by the jackknife.

        With x from all draws and x_i without draw i of a fold of m: `x - sum over folds (m - 1) (mean x_i - x)`, which
        leaves a bias of order 1/K^2, and `se^2 = sum over folds (m - 1)/m sum_i (x_i - mean x_i)^2` (Efron and Stein
        1981). A number that is not finite for all draws or for some K - 1 of them is not determined.
        """
        value, each = float(number(self.whole)), number(self.without)
        if not (torch.isfinite(each).all() and abs(value) < float("inf")):
            return Estimate(NAN, NAN)
        variance, corrected = 0.0, value
        for fold in self.folds:
            part = each[list(fold)]
            corrected -= (len(fold) - 1) * (float(part.mean()) - value)
            variance += (len(fold) - 1) / len(fold) * float((part - part.mean()).square().sum())
        return Estimate(corrected, variance**0.5)


def sums(
    pairs: Sequence[Float64[Tensor, "K K"]],
    means: Sequence[Float64[Tensor, " K"]] = (),
    folds: Sequence[Sequence[int]] | None = None,
) -> Sums:
    """U-statistics of each of `pairs`, then plain means of each of `means`, folds (default: one) counting equally."""
    table = torch.stack([(each + each.T) / 2 for each in pairs])
    lists = torch.stack(list(means)) if means else table.new_empty(0, table.shape[1])
    folds = folds or [range(table.shape[1])]
    count = len(pairs) + len(means)
    full, without = [], table.new_empty(table.shape[1], count)
    for fold in folds:
        index = torch.tensor(list(fold), device=table.device)
        m = len(fold)
        block = table[:, index][:, :, index]
        rows = block.sum(2) - block.diagonal(dim1=1, dim2=2)  # [q, m]
        total, listed = rows.sum(1, keepdim=True), lists[:, index]
        plain = listed.sum(1, keepdim=True)
        full.append(torch.cat([total / (m * (m - 1)), plain / m]).squeeze(1))
        left = torch.cat([(total - 2 * rows) / ((m - 1) * (m - 2)), (plain - listed) / (m - 1)])
        without[index] = left.T
    everything = torch.stack(full)
    for number, fold in enumerate(folds):
        others = everything.sum(0) - everything[number]
        index = torch.tensor(list(fold), device=table.device)
        without[index] = (without[index] + others) / len(folds)
    return Sums(everything.mean(0), without, folds)


# Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def t_95(degrees: int) -> float:
    """Standard errors on either side of a 95 % interval with so many degrees of freedom, to 0.003."""
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    return 1.960 + 2.372 / degrees + 2.82 / degrees**2  # Cornish and Fisher 1938
