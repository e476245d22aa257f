"""Signs that rest on draws: what draws can tell, with its error, and what they cannot, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.measure.factor_estimate import WIDEST, FactorOfDraws
from curvscope.measure.jackknife import Estimate, of_positive, t_95
from curvscope.measure.signs import missing, sign_row
from curvscope.records import StabilityRow

TOP_DIRECTION = (
    "the top direction of a sum of few draws leans to the draws, and with it the examples it blames: --fisher exact"
)
RESOLVED = "{rank} of {size} eigenvalues are resolved"


@dataclass(frozen=True)
class Draws:
    """How a layer's columns were drawn: probe or mc, how many, and why they tell no error of their own, if so."""

    fisher: str
    count: int
    refused: str = ""

    @property
    def words(self) -> str:
        """For reasons, e.g. "8 probes"."""
        noun = "probe" if self.fisher == "probe" else "drawn label"
        return f"{self.count} {noun}{'' if self.count == 1 else 's'}"


def _estimated(quantity: str, found: Estimate, draws: int, *, layer: str = "", reason: str = "") -> StabilityRow:
    """A sign from so many draws: its verdict rests on both ends of the 95 % interval."""
    half = t_95(draws - 1) * found.stderr
    ends = {"low": max(0.0, found.value - half), "high": found.value + half}
    return sign_row(quantity, found.value, layer=layer, **ends, stderr=found.stderr, status="estimated", reason=reason)


def dead_outputs(layer: str, share: float, draws: Draws) -> StabilityRow:
    """The share of outputs that no draw reaches: an upper bound of those that no curvature reaches.

    A Rademacher probe misses an output that curvature reaches with probability 1/2 at most, so that all K do with at
    most 2^-K. Labels may be drawn too rarely to reach it: then no more than "below" can be said.
    """
    if draws.fisher == "probe":
        odds = 2.0**-draws.count
        reason = f"under {draws.words}: an output that curvature does reach would be missed with odds below {odds:.2g}"
        return sign_row("dead_outputs", share, layer=layer, status="estimated", reason=reason)
    reason = f"under {draws.words}: at most so many; labels that are drawn rarely may reach more outputs"
    return sign_row("dead_outputs", share, layer=layer, low=0.0, high=share, status="estimated", reason=reason)


def condition_of_B(
    layer: str, B: Tensor, B_draws: Tensor, draws: Draws, known: FactorOfDraws | None = None
) -> list[StabilityRow]:
    """lambda_max / lambda_min of the worst group's B with its error, and the share that float32 does not resolve.

    Draws only add to B's range. Where the first half of them fills what all of them do, so does, but for draws that
    all fell into it by chance, every further one. `known` are the eigenvalues of the draws, where they are.
    """
    condition, unresolved = "condition_B", "unresolved_B"
    refused = draws.refused if bool((B != 0).any()) else f"B is zero under {draws.words}"
    eps = torch.finfo(torch.float32).eps
    found = None
    if not refused:
        found = FactorOfDraws.of(B_draws, eps) if known is None else replace(known, eps=eps)
    if found is None:
        refused = refused or f"told of draws up to {WIDEST} outputs only"
        return [missing(name, refused, layer=layer) for name in (condition, unresolved)]
    size, rank = B.shape[-1], int(found.ranks[0].min())
    words = RESOLVED.format(rank=rank, size=size)
    if rank == size and found.settled:
        reason = f"from {draws.words}"
        share = sign_row(unresolved, 0.0, layer=layer, status="estimated", reason=f"{words}, {reason}")
        return [_estimated(condition, found.condition(), draws.count, layer=layer, reason=reason), share]
    half = FactorOfDraws.of(B_draws[: draws.count // 2], eps)
    if half is None or bool((half.ranks[0] != found.ranks[0]).any()) or not found.settled:
        why = f"{draws.words} do not fill the range of B: more of them may find more of it"
        return [missing(name, why, layer=layer) for name in (condition, unresolved)]
    words = f"{words}, by half of {draws.words} as by all"
    share = sign_row(unresolved, 1 - rank / size, layer=layer, status="estimated", reason=words)
    return [missing(condition, f"singular to float32: {words}", layer=layer), share]


def position_share(layer: str, energy: Float64[Tensor, "K R"], draws: Draws) -> StabilityRow:
    """The largest share of one position in the trace of expand's B, from every draw's energy at the positions."""
    if draws.refused:
        return missing("position_share", draws.refused, layer=layer)
    total = energy.sum(0)
    less = total - energy
    whole, without = total / total.sum(), less / less.sum(1, keepdim=True)
    place = int(whole.argmax())
    (found,) = of_positive(whole[place, None], without[:, place, None])
    reason = f"position {place} of {whole.numel()}, from {draws.words}"
    return _estimated("position_share", found, draws.count, layer=layer, reason=reason)
