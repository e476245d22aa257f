"""Every number that a warning about stability, signs or damping hangs on, and where it comes from.

The limits of the signs stand with the signs (`curvscope.measure.signs`, docs/signs.md); here are those of the rules,
and `limits`, which takes their place. The defaults are what `curvscope.analyze` uses; others serve to find out, from a
run that is there, what would have been said with them (docs/zoo.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from curvscope.measure.signs import side
from curvscope.records import StabilityRow

CHOICE = "a choice"


def _number(default: float, origin: str = CHOICE) -> float:
    return field(default=default, metadata={"origin": origin})


@dataclass(frozen=True)
class Thresholds:
    """The numbers of the rules.

    Attributes:
        far: weights, inputs, examples, learning rates and logit gaps so many times over their signs' limits warn alone.
        out_of_step: weights are out of scale where they also exceed the other layers' median so many times.
        dead: from this share of dead units on they warn alone.
        explodes: over this spectral radius a recurrent weight warns alone.
        large_step: over this share of the weights' length a step warns alone.
        carries: over this share of curvature or gradients an example out of scale warns.
        part: from this share of the top direction on a layer's learning rate may be the cause of an instability.
        trusted: the share of the promised decrease under which a K-FAC step is too long.
        lost: over this share of the best decrease too large a damping warns.
        limits: by quantity, in place of the signs' own limits.
    """

    far: float = _number(4.0)
    out_of_step: float = _number(3.0)
    dead: float = _number(0.9)
    explodes: float = _number(3.0)
    large_step: float = _number(0.5)
    carries: float = _number(0.5)
    part: float = _number(0.1)
    trusted: float = _number(0.25, "arXiv:1503.05671, section 6.6")
    lost: float = _number(0.1)
    limits: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def judged(self, rows: Sequence[StabilityRow]) -> Sequence[StabilityRow]:
        """The rows with `limits` in place of their own thresholds, and verdicts by them."""
        if not self.limits:
            return rows
        return [self._row(row) if row.quantity in self.limits else row for row in rows]

    def _row(self, row: StabilityRow) -> StabilityRow:
        limit = self.limits[row.quantity]
        return dataclasses.replace(row, threshold=limit, verdict=side(limit, row.value, row.low, row.high))


SHIPPED = Thresholds()
