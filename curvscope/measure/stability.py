"""Verdicts on stability: a number, its spread over the batch and its halves, and the threshold it is compared with.

One batch biases the top eigenvalue up, one layer's block biases it down, and so there are three verdicts: above only
where even the lowest of the values is above the threshold, below only where even the highest (with what its residual
leaves open) is below it, undecided between. The threshold is that of full-batch steps on the quadratic model: training
on mini-batches can diverge below it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from curvscope.curvature.extremes import Extremes
from curvscope.records import NAN, StabilityRow

WITHIN_BUDGET = "the time for it was spent before the iteration converged; the value is a lower bound"
NO_SPREAD = "the iterations on its halves did not converge, so that there is no spread"
FEW_STEPS = "the iteration did not converge in its number of steps; the value is a lower bound"


@dataclass(frozen=True)
class Spread:
    """One eigenvalue on the whole batch, and on its halves: the bounds that a verdict rests on.

    A Ritz value is a lower bound of the top eigenvalue; what is above it within the residual counts for `ceiling`,
    which is infinite where an iteration did not converge.
    """

    value: float
    low: float
    high: float
    ceiling: float
    residual: float
    converged: bool
    parts: int = 0

    @classmethod
    def of(cls, whole: Extremes, parts: Sequence[Extremes]) -> Spread:
        """From the iterations on the batch and on its parts."""
        tops = [whole.top[0], *(part.top[0] for part in parts)]
        values = [pair.value for pair in tops]
        ceiling = max(pair.value + pair.residual for pair in tops)
        converged = all(pair.converged for pair in tops)
        return cls(
            values[0],
            min(values),
            max(values),
            ceiling if converged else math.inf,
            tops[0].residual,
            tops[0].converged,
            len(parts),
        )

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value; NaN where they are not known: no halves, or one that did not converge."""
        return (self.low, self.high) if self.parts and math.isfinite(self.ceiling) else (NAN, NAN)

    def scaled(self, factor: float) -> Spread:
        """The same of factor times the operator."""
        return Spread(
            factor * self.value,
            factor * self.low,
            factor * self.high,
            factor * self.ceiling,
            factor * self.residual,
            self.converged,
            self.parts,
        )


def verdict(spread: Spread, threshold: float, *, halved: bool, joint: bool = True) -> str:
    """Above, below or undecided.

    Without halves (`halved` false) nothing is decided. Where the block does not hold all that moves (`joint` false) it
    can be above, which implies that the whole is, but never speaks for the whole from below: the caller says "below" of
    the block alone.
    """
    if not halved or not math.isfinite(threshold):
        return "undecided"
    if spread.low > threshold:
        return "above"
    if spread.ceiling < threshold:
        return "below" if joint else "undecided"
    return "undecided"


def eigenvalue_row(
    scope: str,
    layer: str,
    quantity: str,
    spread: Spread,
    *,
    threshold: float = NAN,
    said: str = "not_assessed",
    source: str = "",
    reason: str = "",
    timed_out: bool = False,
) -> StabilityRow:
    """One eigenvalue as a row; not_converged where its own iteration is."""
    if not spread.converged:
        reason = "; ".join(filter(None, (WITHIN_BUDGET if timed_out else FEW_STEPS, reason)))
    elif spread.parts and math.isinf(spread.ceiling):
        reason = "; ".join(filter(None, (NO_SPREAD, reason)))
    low, high = spread.bounds
    return StabilityRow(
        scope=scope,
        layer=layer,
        quantity=quantity,
        value=spread.value,
        low=low,
        high=high,
        threshold=threshold,
        verdict=said,
        residual=spread.residual,
        source=source,
        status="ok" if spread.converged else "not_converged",
        reason=reason,
    )
