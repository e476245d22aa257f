"""Eigenvalues of factors made of a few draws, with standard errors: K-FAC's spectra, B's extremes and condition.

A has no draw in it; B is the mean of what each draw alone gives. Every number is computed without each draw in turn
(`jackknife.of_positive`). What few draws cannot tell is not given: the smallest eigenvalues where B would lose rank
with one draw less.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.curvature.eigen import eigvalsh
from curvscope.extract.collector import Extract
from curvscope.measure.jackknife import Estimate, of_positive
from curvscope.measure.terms import Term
from curvscope.records import NAN, SpectrumRow

# Wider factors get no error bars: K more eigendecompositions each.
WIDEST = 1024
NUMBERS = ("lambda_max", "lambda_min_positive", "condition", "effective_rank")
BIASED = (
    "eigenvalues of a factor made of few draws are biased, which the error bars allow for; not so for the stable rank, "
    "which divides by the square of the largest, and is not given"
)
UNKNOWN = "eigenvalues of a factor made of few draws are biased, and have no error bar here"
TOO_FEW = "with one draw less B has another rank: too few draws to tell its smallest eigenvalue"


@dataclass(frozen=True)
class FactorOfDraws:
    """Eigenvalues of B, ascending: [K + 1, groups, d], of all draws and then without each; zero is told with `eps`."""

    values: Float64[Tensor, "K+1 G d"]
    eps: float

    @classmethod
    def of(cls, given: Tensor, eps: float) -> FactorOfDraws | None:
        """From B of every draw alone, [K, d, d] or [K, G, d, d], whose sum is B; None where it is too wide."""
        if given.shape[-1] > WIDEST or given.shape[0] < 2:
            return None
        each = given.double().reshape(given.shape[0], -1, *given.shape[-2:])
        draws, whole = each.shape[0], each.sum(0)
        less = torch.stack([eigvalsh((whole - one) * (draws / (draws - 1))) for one in each])
        return cls(torch.cat([eigvalsh(whole)[None], less]), eps)

    def kept(self, values: Tensor) -> Tensor:
        """Which of the eigenvalues of several matrices count as nonzero."""
        return values > values.amax(-1, keepdim=True) * values.shape[-1] * self.eps

    @classmethod
    def every(cls, extract: Extract, eps: float) -> dict[tuple[str, str], FactorOfDraws | None]:
        """Those of all factors of a layer that are made of draws, by role ("" where there is one) and flavour."""
        found: dict[tuple[str, str], FactorOfDraws | None] = {}
        for name, role in (extract.roles or {"": extract}).items():
            for flavour, given in role.probe_B.items():
                same = flavour == "reduce" and role.positions == 1 and (name, "expand") in found
                found[name, flavour] = found[name, "expand"] if same else cls.of(given, eps)
        return found

    @property
    def ranks(self) -> Tensor:
        """Of all draws and without each, [K + 1, G]."""
        return self.kept(self.values).sum(-1)

    @property
    def settled(self) -> bool:
        """Whether no draw changes the rank."""
        ranks = self.ranks
        return bool((ranks == ranks[0]).all())

    def extremes(self) -> tuple[Estimate, Estimate, Estimate]:
        """The trace, and the largest and smallest eigenvalue over all groups; the smallest as it is."""
        table = torch.stack([self.values.sum((1, 2)), self.values.amax((1, 2)), self.values.amin((1, 2))], -1)
        trace, most, least = of_positive(table[0], table[1:])
        return trace, most, least

    def condition(self) -> Estimate:
        """lambda_max / lambda_min of the worst group; NaN where an eigenvalue is not positive."""
        worst = (self.values[..., -1] / self.values[..., 0]).amax(-1, keepdim=True)
        positive = bool((self.values[..., 0] > 0).all())
        return of_positive(worst[0], worst[1:])[0] if positive else Estimate(float(worst[0, 0]), NAN)


def spectrum_estimates(term: Term, B: FactorOfDraws | None) -> dict[str, Estimate] | None:
    """NUMBERS of B (x) A with their errors, in the columns' unit; None where `B`, the term's own, is too wide.

    An eigenvalue of a factor counts as zero below the largest times n times eps, as in `approximation_spectrum`.
    """
    if B is None:
        return None
    A = eigvalsh(term.A.double()).reshape(-1, term.A.shape[-1])  # [G, d_in]
    rows = [_numbers(A, values, B) for values in B.values]
    table = torch.stack(rows)
    found = dict(zip(NUMBERS, of_positive(table[0], table[1:]), strict=True))
    if not B.settled:
        found |= {name: Estimate(NAN, NAN) for name in ("lambda_min_positive", "condition")}
    return found


def with_errors(row: SpectrumRow, found: dict[str, Estimate] | None, scale: float) -> SpectrumRow:
    """A row of tables/spectra with the standard errors of its numbers, or without the numbers that draws can't tell."""
    if found is None or all(found[name].stderr != found[name].stderr for name in NUMBERS):
        return dataclasses.replace(row, status="estimated", reason="; ".join(filter(None, (UNKNOWN, row.reason))))
    changes: dict[str, Any] = {"stable_rank": NAN}
    for name in NUMBERS:
        value, unit = getattr(row, name), scale if name.startswith("lambda") else 1.0
        if value != value:
            continue
        if found[name].value != found[name].value:
            changes[name] = NAN
        else:
            changes[name + "_stderr"] = found[name].stderr * unit
    reasons = [BIASED, TOO_FEW if "condition" in changes else "", row.reason]
    return dataclasses.replace(row, **changes, status="estimated", reason="; ".join(filter(None, reasons)))


def _numbers(A: Tensor, B: Tensor, about: FactorOfDraws) -> Tensor:
    """NUMBERS of the block-diagonal matrix of B_g (x) A_g, from the factors' eigenvalues [G, d]."""
    kept_A, kept_B = about.kept(A), about.kept(B)
    low = torch.where(kept_A, A, torch.inf).amin(-1) * torch.where(kept_B, B, torch.inf).amin(-1)
    A, B = A * kept_A, B * kept_B
    high = (A.amax(-1) * B.amax(-1)).max()
    least = low.min()
    trace = (A.sum(-1) * B.sum(-1)).sum()
    logs = (torch.xlogy(A, A).sum(-1) * B.sum(-1) + A.sum(-1) * torch.xlogy(B, B).sum(-1)).sum()
    return torch.stack([high, least, high / least, (trace.log() - logs / trace).exp()])


def factor_errors(B: FactorOfDraws | None, name: str, scale: float) -> dict[str, float]:
    """Standard errors of a factor's trace and extreme eigenvalues, as attributes of the layer beside their values.

    `scale` brings them to the loss's unit; none where B is too wide.
    """
    if B is None:
        return {}
    trace, most, least = B.extremes()
    named = {"trace": trace, "lambda_max": most, "lambda_min": least}
    return {f"{name}/{key}_stderr": one.stderr * scale for key, one in named.items() if one.stderr == one.stderr}
