"""What a curve over damping says: the safe range, the best value, and where noise is amplified.

The Levenberg-Marquardt rule (arXiv:1503.05671, section 6.5) compares the decrease that a model promises with the one
that comes: below 1/4 the damping has to grow. Here the promise is the approximation's, and what comes is the exact
quadratic model's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from curvscope.records import NAN, DampingRow, GlobalDampingRow, Layer, RangeRow

Values = npt.NDArray[np.float64]

TRUSTED = 0.25
PLAIN = 0.1
NOISY_DIMENSION = 0.9
NOISY_ALPHA = 0.25
UNUSABLE = "no damping of the grid lowers the exact quadratic model"
NO_SERIES = "steps of all layers are not taken with this approximation"
NO_OWN = "no value of its own, it takes the one for all layers"
Series = tuple[str, str]


@dataclass(frozen=True)
class Curve:
    """One approximation's steps over ascending damping; NaN where a value was not assessed.

    `slope` is g.p and `bend` p.Gp + decay p.p, so that the decrease is slope - bend / 2.
    """

    damping: Values
    slope: Values
    bend: Values
    rho: Values
    distance: Values
    dimension: Values
    alpha: Values

    @property
    def decrease(self) -> Values:
        """What the exact quadratic model, without damping, loses by each step."""
        return self.slope - self.bend / 2


def joined(first: Curve, second: Curve) -> Curve:
    """Both curves' values, by ascending damping."""
    order = np.argsort(np.concatenate([first.damping, second.damping]), kind="stable")
    return Curve(
        *(np.concatenate(pair)[order] for pair in zip(vars(first).values(), vars(second).values(), strict=True))
    )


def safe_range(curve: Curve) -> tuple[float, float, str]:
    """(low, high, remark): from low on rho >= 1/4; up to high the distance to the gradient's step is >= 1/10.

    NaN: as far as the grid goes. Edges are interpolated between neighbours, in the logarithm of damping. Where low >
    high there is no safe range.
    """
    known = np.isfinite(curve.rho) & np.isfinite(curve.distance)
    damping, rho, distance = curve.damping[known], curve.rho[known], curve.distance[known]
    if not len(damping):
        return NAN, NAN, ""
    low = high = NAN
    bad = np.flatnonzero(rho < TRUSTED)
    if len(bad):
        last = int(bad[-1])
        if last + 1 == len(damping):
            return float(damping[last]), NAN, "no damping of the grid is large enough for this approximation"
        low = _crossing(damping[last : last + 2], rho[last : last + 2], TRUSTED)
    curved = np.flatnonzero(distance >= PLAIN)
    if not len(curved):
        return low, float(damping[0]), "at every damping of the grid the step is plain gradient descent"
    first = int(curved[-1])
    if first + 1 < len(damping):
        high = _crossing(damping[first : first + 2], np.log(distance[first : first + 2]), math.log(PLAIN))
    if low > high:
        return low, high, "no safe range: where the approximation can be trusted, its step is plain gradient descent"
    return low, high, ""


def _crossing(damping: Values, values: Values, level: float) -> float:
    """The damping at which the line through two points over log damping meets the level."""
    first, second = (float(value) for value in values)
    if not (math.isfinite(first) and math.isfinite(second)) or first == second:
        return float(damping[1])
    share = (level - first) / (second - first)
    return float(damping[0] * (damping[1] / damping[0]) ** share)


def noise_below(curve: Curve, rank: int) -> float:
    """The largest damping with an effective dimension near `rank` = min(P, N K) and alpha* < 1/4; NaN if none."""
    noisy = (curve.dimension >= NOISY_DIMENSION * rank) & (curve.alpha < NOISY_ALPHA)
    return float(curve.damping[noisy].max()) if noisy.any() else NAN


def range_row(curve: Curve, rows: Sequence[DampingRow], current: float, rank: int, remark: str = "") -> RangeRow:
    """One row of tables/ranges from an approximation's rows of tables/damping and its curve.

    `current` is the optimizer's own damping or NaN, `rank` is min(P, N K), `remark` joins the row's reason.
    """
    marked = {mark: row for row in rows for mark in row.mark.split(", ") if mark}
    best, own = marked.get("recommended"), marked.get("current")
    row = RangeRow(rows[0].layer, rows[0].approximation, rows[0].form, current=current)
    if best is None:
        reason = next((one.reason for one in rows if one.status == "not_assessed"), UNUSABLE)
        return dataclasses.replace(row, status="not_assessed", reason=reason)
    low, high, limit = safe_range(curve)
    notes = [words for words in (remark, limit) if words]
    assessed = curve.damping[np.isfinite(curve.decrease)]
    for end, place in (("smallest", assessed.min()), ("largest", assessed.max())):
        if best.damping == place:
            notes.append(f"the {end} damping of the grid is the best")
    known = own is not None and not math.isnan(own.predicted_decrease)
    return dataclasses.replace(
        row,
        low=low,
        high=high,
        recommended=best.damping,
        decrease=best.predicted_decrease,
        gain=1 - own.predicted_decrease / best.predicted_decrease if own is not None and known else NAN,
        noise_below=noise_below(curve, rank),
        standing=standing(current, low, high) if known else "",
        reason="; ".join(notes),
    )


def standing(current: float, low: float, high: float) -> str:
    """Where a damping is: too_small, safe or too_large; too small counts before too large."""
    return "too_small" if current < low else "too_large" if current > high else "safe"


def with_form_gaps(rows: Sequence[RangeRow], curves: Mapping[tuple[str, str], Curve]) -> list[RangeRow]:
    """The rows with `form_gap` where both forms are known.

    At the current damping, or the one recommended for the eigenbasis; between computed values the decrease is taken
    linear in the logarithm of damping.
    """
    places = {row.approximation: row.recommended for row in rows if row.form == "eigenbasis"}
    found = []
    for row in rows:
        both = [curves.get((row.approximation, form)) for form in ("eigenbasis", "factored")]
        place = places.get(row.approximation, NAN) if math.isnan(row.current) else row.current
        at = [_decrease_at(curve, place) for curve in both if curve is not None and not math.isnan(place)]
        gap = 1 - min(at) / max(at) if len(at) == 2 and max(at) > 0 else NAN
        found.append(dataclasses.replace(row, form_gap=gap))
    return found


def own_dampings(layers: Mapping[str, Layer]) -> dict[Series, dict[str, float]]:
    """What each layer's own block recommends, by approximation and form: the best where that layer moves alone."""
    found: dict[Series, dict[str, float]] = {}
    for name, layer in layers.items():
        for row in layer.ranges:
            if not math.isnan(row.recommended):
                found.setdefault((row.approximation, row.form), {})[name] = row.recommended
    return found


def with_joint(
    rows: Sequence[RangeRow], summaries: Sequence[GlobalDampingRow], withheld: Mapping[Series, str]
) -> list[RangeRow]:
    """The rows with `joint`, the damping to set where all layers step together, from tables/global_damping.

    Where it is withheld (for the reason given by approximation and form) or steps were not taken, the row's reason says
    why.
    """
    known = {(row.approximation, row.form): row for row in summaries}
    found = []
    for row in rows:
        series = row.approximation, row.form
        why = withheld.get(series, "" if series in known else NO_SERIES)
        if series in known and known[series].status == "not_assessed":
            why = known[series].reason
        if not why and math.isnan(row.recommended):
            why = NO_OWN
        if why:
            found.append(dataclasses.replace(row, reason="; ".join(filter(None, (row.reason, f"joint: {why}")))))
        else:
            found.append(dataclasses.replace(row, joint=row.recommended * known[series].per_layer_factor))
    return found


def _decrease_at(curve: Curve, damping: float) -> float:
    known = np.isfinite(curve.decrease)
    if not known.any():
        return NAN
    return float(np.interp(math.log(damping), np.log(curve.damping[known]), curve.decrease[known]))
