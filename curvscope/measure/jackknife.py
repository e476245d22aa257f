"""Unbiased means over pairs of draws, and the jackknife of numbers made from them, with intervals that heed skewness.

Draws X_1 ... X_K with inner products `pairs[i, j] = <X_i, Y_j>` estimate <E X, E Y> without bias by the mean over
i != j (a U-statistic). Draws may come in folds, of which only pairs of the same fold are taken; folds count equally.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.records import NAN

# Fewer draws a fold leave no pair when two are deleted.
MINIMUM_FOLD = 4
# A standard error is at most doubled for skewness.
MOST_WIDENED = 0.5


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error; both NaN where the draws do not determine it."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Sums:
    """Unbiased estimates of several sums: from all draws, without each draw in turn, and without each two.

    Attributes:
        whole: [q].
        without: [K, q], row i without draw i.
        without_two: [K, K, q], entry i, j without draws i and j (on the diagonal: without i).
        folds: the draws of each fold.
        rounding: relative error of the draws' own arithmetic; no standard error is smaller.
    """

    whole: Float64[Tensor, " q"]
    without: Float64[Tensor, "K q"]
    without_two: Float64[Tensor, "K K q"]
    folds: Sequence[Sequence[int]]
    rounding: float = 0.0

    def moved(self, changes: Float64[Tensor, "K q"]) -> Sums:
        """With what leaving out each draw changes beside its pairs, [K, q].

        Of two draws of a fold of m the changes add as those of a mean do, times (m - 1)/(m - 2).
        """
        scale = changes.new_ones(len(changes), len(changes))
        for fold in self.folds:
            index = torch.tensor(list(fold), device=changes.device)
            scale[index[:, None], index] = (len(fold) - 1) / (len(fold) - 2)
        two = self.without_two + scale[..., None] * (changes[:, None] + changes)
        diagonal = torch.arange(len(changes), device=changes.device)
        two[diagonal, diagonal] = self.without_two[diagonal, diagonal] + changes
        return replace(self, without=self.without + changes, without_two=two)

    def of(self, number: Callable[[Tensor], Tensor]) -> Estimate:
        """A number made of the sums, [..., q] -> [...], by the jackknife; a 95 % interval takes `t_95(K - 1)`.

        With x from all draws, x_i without draw i of a fold of m and x_ij without two: the value is
        `x - sum over folds (m - 1) (mean x_i - x)`, which leaves a bias of order 1/K^2. Its variance is
        `sum over folds (m - 1)/m sum_i (x_i - mean x_i)^2`, less what second differences say is counted twice (Efron
        and Stein 1981; a number all of whose variance is of second order, such as an error near 0, would get 2 to 3
        times its variance).

        Draws are skewed: where x comes out too large, so may its standard error come out too small. The slope b of
        the standard error in x is estimated from the deletions, too; the longer arm of the interval that solves
        `|x - theta| = t se(theta)` is `t se / (1 - t |b|)`. Of b the share 1 - 3/K is taken, since it is uncertain
        itself. A number that is not finite for all draws or without one of them is not determined; one that is not
        without two gets the widest interval.
        """
        value, each = float(number(self.whole)), number(self.without)
        if not (torch.isfinite(each).all() and abs(value) < float("inf")):
            return Estimate(NAN, NAN)
        two = number(self.without_two)
        variance, excess, corrected = 0.0, 0.0, value
        least = 0.0
        for fold in self.folds:
            m, part = len(fold), each[list(fold)]
            corrected -= (m - 1) * (float(part.mean()) - value)
            own = (m - 1) / m * float((part - part.mean()).square().sum())
            variance += own
            least += own * (m - 2) / (2 * (m - 1))
            excess += _counted_twice(value, part, two[list(fold)][:, list(fold)])
        stderr = 2 * variance**0.5
        if torch.isfinite(two).all():
            widened = min(MOST_WIDENED, (1 - 3 / self.without.shape[0]) * self._tilt(each, two, variance))
            stderr = max(variance - excess, least) ** 0.5 / (1 - widened)
        return Estimate(corrected, max(stderr, self.rounding * abs(value)))

    def _tilt(self, each: Tensor, two: Tensor, variance: float) -> float:
        """`t |b|`: how the half width of the interval changes with the number, from the variances without a draw."""
        changes, spreads = [], []
        of_each = torch.zeros_like(each)
        draws = torch.arange(each.numel(), device=each.device)
        for fold in self.folds:
            index = torch.tensor(list(fold), device=each.device)
            kept = (draws[:, None] != index).double()
            count = kept.sum(1)
            middle = (two[:, index] * kept).sum(1, keepdim=True) / count[:, None]
            of_each += (count - 1) / count * ((two[:, index] - middle).square() * kept).sum(1)
        for fold in self.folds:
            part, spread = each[list(fold)], of_each[list(fold)]
            changes.append(part - part.mean())
            spreads.append(spread - spread.mean())
        change, spread = torch.cat(changes), torch.cat(spreads)
        size = float(change.square().sum())
        if size == 0.0 or variance == 0.0:
            return 0.0
        slope = float((change * spread).sum()) / size / (2 * variance**0.5)
        return t_95(each.numel() - 1) * abs(slope)


def _counted_twice(value: float, each: Tensor, two: Tensor) -> float:
    """What the delete-one jackknife adds to the variance of a number's second-order part, for one fold.

    Of `sum h_ij 2/(m (m - 1))` with uncorrelated h of variance s^2 it makes `4 s^2/(m (m - 2))` instead of
    `2 s^2/(m (m - 1))`. s^2 comes from `m x - (m - 1)(x_i + x_j) + (m - 2) x_ij`, in which what is linear cancels.
    """
    m = each.numel()
    second = m * value - (m - 1) * (each[:, None] + each) + (m - 2) * two
    square = float(second.square().sum() - second.diagonal().square().sum()) / (m * (m - 1))
    a, b, c = 1 / (m - 1), 1 / (m - 2), 1 / (m - 3)
    # coefficients of h_ij, of the h that share one draw with it, and of all others
    own, shared, other = c - 2 * b * c + 2 * a * b * c, b * c * (2 * a - 1), 2 * a * b * c
    weight = 4 * (own**2 + 2 * (m - 2) * shared**2 + (m - 2) * (m - 3) / 2 * other**2)
    return 2 / ((m - 1) * (m - 2)) * square / weight


def sums(
    pairs: Sequence[Float64[Tensor, "K K"]],
    means: Sequence[Float64[Tensor, " K"]] = (),
    folds: Sequence[Sequence[int]] | None = None,
    rounding: float = 0.0,
) -> Sums:
    """U-statistics of each of `pairs`, then plain means of each of `means`, folds (default: one) counting equally."""
    like = (pairs or means)[0]
    draws = like.shape[-1]
    table = torch.stack([(each + each.T) / 2 for each in pairs]) if pairs else like.new_empty(0, draws, draws)
    lists = torch.stack(list(means)) if means else like.new_empty(0, draws)
    folds = folds or [range(draws)]
    count = len(pairs) + len(means)
    full, one, two = [], like.new_empty(draws, count), like.new_zeros(draws, draws, count)
    for fold in folds:
        index = torch.tensor(list(fold), device=like.device)
        m = len(fold)
        block = table[:, index][:, :, index]
        block = block - torch.diag_embed(block.diagonal(dim1=1, dim2=2))
        rows, listed = block.sum(2), lists[:, index]  # [q, m]
        total, plain = rows.sum(1, keepdim=True), listed.sum(1, keepdim=True)
        whole = torch.cat([total / (m * (m - 1)), plain / m]).squeeze(1)
        full.append(whole)
        left = torch.cat([(total - 2 * rows) / ((m - 1) * (m - 2)), (plain - listed) / (m - 1)]).T
        one[index] = (left - whole) / len(folds)
        left_two = torch.cat(
            [
                (total[..., None] - 2 * rows[:, :, None] - 2 * rows[:, None] + 2 * block) / ((m - 2) * (m - 3)),
                (plain[..., None] - listed[:, :, None] - listed[:, None]) / (m - 2),
            ]
        ).permute(1, 2, 0)
        two[index[:, None], index] = (left_two - whole) / len(folds) - one[index][:, None] - one[index]
    middle = torch.stack(full).mean(0)
    both = middle + one[:, None] + one + two
    diagonal = torch.arange(draws, device=like.device)
    both[diagonal, diagonal] = middle + one
    return Sums(middle, middle + one, both, folds, rounding)


# Standard errors that the bias of eigenvalues has, in units of what the jackknife would correct.
BIAS_DOUBT = 2.0


def of_positive(whole: Float64[Tensor, " q"], without: Float64[Tensor, "K q"]) -> list[Estimate]:
    """Positive numbers that are no sums of pairs (eigenvalues, shares), from all draws and without each: with errors.

    The jackknife runs on their logarithms. The value stays that of all draws, bias and all: eigenvalues of a sum of
    few draws spread too far, by more than 1/K where they repeat, so that no correction can be relied on. The error
    takes it in, `se^2 = (K - 1)/K sum (x_i - mean x_i)^2 + (2 (K - 1) (mean x_i - x))^2`, and is the longer arm of the
    interval once that is no longer logarithmic. NaN where a number is not positive, or not without one of the draws.
    """
    draws = len(without)
    t = t_95(draws - 1)
    x, each = whole.log(), without.log()
    own = (draws - 1) / draws * (each - each.mean(0)).square().sum(0)
    bias = (draws - 1) * (each.mean(0) - x)
    arms = ((own + (BIAS_DOUBT * bias).square()).sqrt() * t).expm1() / t
    return [
        Estimate(value, value * arm if value > 0 and arm < float("inf") else NAN)
        for value, arm in zip(whole.tolist(), arms.nan_to_num(float("inf")).tolist(), strict=True)
    ]


# Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def t_95(degrees: int) -> float:
    """Standard errors on either side of a 95 % interval with so many degrees of freedom, to 0.003."""
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    return 1.960 + 2.372 / degrees + 2.82 / degrees**2  # Cornish and Fisher 1938
