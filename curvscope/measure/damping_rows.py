"""Rows of tables/damping, and curves over damping, from the sums over one layer's damped steps.

Everything is a formula in the sums of `curvscope.measure.damped`, which are in the columns' unit; rows are in the
loss's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from curvscope.measure.damped import ExactSums, StepSums
from curvscope.measure.ranges import Curve, Values
from curvscope.records import NAN, DampingRow

ROUNDING = "below the rounding of float32 columns: --dtype float64 tells more"
NO_STEP = "the layer's gradient is zero, so there is no step"


@dataclass(frozen=True)
class RowMaker:
    """Makes one layer's rows.

    Attributes:
        layer: its name.
        scale: what turns the columns' unit into the loss's.
        mean: the block's mean eigenvalue tr G / P.
        decay: the optimizer's L2 weight decay, which adds to every damping.
        current: the optimizer's own damping; None if unknown.
        unresolved: damping below this is rounding of the columns' dtype; 0 for float64.
    """

    layer: str
    scale: float
    mean: float
    decay: float
    current: float | None
    unresolved: float

    def exact(self, damping: Values, exact: ExactSums) -> list[DampingRow]:
        """The block itself as the reference."""
        rx, xx, xGx = (_array(value) for value in (exact.rx, exact.xx, exact.xGx))
        dimension = _array(exact.dimension)
        shift, decay = (damping + self.decay) / self.scale, self.decay / self.scale
        distance = np.maximum(shift**2 * xx - 2 * shift * rx + exact.rr, 0.0)
        rows = []
        for i, value in enumerate(damping):
            decrease = rx[i] - (xGx[i] + decay * xx[i]) / 2
            numbers: dict[str, Any] = {"effective_dimension": dimension[i]}
            if exact.rr > 0:
                numbers |= {
                    "angle_degrees": 0.0,
                    "length_ratio": 1.0,
                    "predicted_decrease": decrease / self.scale,
                    "decrease_share": 1.0,
                    "rho": 1.0,
                    "angle_to_gradient_degrees": _degrees(rx[i], xx[i], exact.rr),
                    "gradient_distance": (distance[i] / exact.rr) ** 0.5,
                    "alpha_star": rx[i] / (xGx[i] + shift[i] * xx[i]),
                    "condition": 1.0,
                }
            rows.append(self._row("ggn", "eigenbasis", value, numbers, exact.rr))
        return rows

    def steps(
        self, name: str, form: str, damping: Values, sums: StepSums, exact: ExactSums, least: float
    ) -> tuple[list[DampingRow], Curve]:
        """An approximation's rows and its curve over ascending damping; `least` is M's smallest eigenvalue."""
        scale, rr = self.scale, exact.rr
        rp, pp, pGp, pMp, px, distance, dimension = (_array(value) for value in vars(sums).values())
        rx, xx, xGx = (_array(value) for value in (exact.rx, exact.xx, exact.xGx))
        shift, decay = (damping + self.decay) / scale, self.decay / scale
        valid = (shift > -2 * least) & np.isfinite(pp) & np.isfinite(pGp) & (rr > 0)
        with np.errstate(all="ignore"):
            bend = pGp + decay * pp
            decrease, best = rp - bend / 2, rx - (xGx + decay * xx) / 2
            promised = rp - (pMp + decay * pp) / 2
            columns = {
                "angle_degrees": np.array([_degrees(*three) for three in zip(px, pp, xx, strict=True)]),
                "length_ratio": np.sqrt(pp / xx),
                "predicted_decrease": decrease / scale,
                "decrease_share": decrease / best,
                "rho": decrease / promised,
                "angle_to_gradient_degrees": np.array([_degrees(a, b, rr) for a, b in zip(rp, pp, strict=True)]),
                "gradient_distance": np.sqrt(distance / rr) if rr > 0 else distance,
                "alpha_star": rp / (pGp + shift * pp),
            }
        rows = []
        for i, value in enumerate(damping):
            numbers = {key: column[i] for key, column in columns.items()} if valid[i] else {}
            indefinite = shift[i] <= -2 * least
            numbers |= {} if indefinite else {"effective_dimension": dimension[i]}
            reason = f"M has eigenvalues down to {least * scale:.1e}: with this damping it is not safely positive"
            rows.append(self._row(name, form, value, numbers, rr, reason if indefinite else ""))

        def known(column: Values) -> Values:
            return np.where(valid, column, NAN)

        curve = Curve(
            damping,
            known(rp / scale),
            known(bend / scale),
            known(columns["rho"]),
            known(columns["gradient_distance"]),
            known(dimension),
            known(columns["alpha_star"]),
        )
        return rows, curve

    def _row(
        self, name: str, form: str, damping: float, numbers: Mapping[str, float], rr: float, reason: str = ""
    ) -> DampingRow:
        """One row with its marks, and in words what limits it."""
        status, notes = "ok", [reason] if reason else []
        if reason:
            status = "not_assessed"
        elif rr == 0:
            status, notes = "not_assessed", [NO_STEP]
        elif damping + self.decay < self.unresolved:
            notes.append(ROUNDING)
        return DampingRow(
            self.layer,
            name,
            form,
            damping=float(damping),
            relative=float(damping / self.mean) if self.mean > 0 else NAN,
            mark="current" if damping == self.current else "",
            **{key: float(value) for key, value in numbers.items()},
            status=status,
            reason="; ".join(notes),
        )


def _array(values: Tensor) -> Values:
    return values.cpu().numpy()


def _degrees(inner: float, left: float, right: float) -> float:
    """The angle between two vectors from their inner product and squares; NaN where one is zero."""
    if not (left > 0 and right > 0):
        return NAN
    # rounding may take a cosine beyond 1
    return math.degrees(math.acos(min(1.0, max(-1.0, inner / (left * right) ** 0.5))))
