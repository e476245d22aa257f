"""The damping of the largest decrease between the grid's values: every peak of the curve, not only the highest seen.

Log slope and log bend are smooth over log damping, their difference need not be: it can have a second peak, and one
that no value of the grid is near. So the curve is interpolated and looked at between the grid's values, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from curvscope.measure.ranges import Curve, Values

GOLDEN = (5**0.5 - 1) / 2
# An even number: of an odd one the last would lie as far to the left as to the right, and rounding would choose.
NEIGHBOURS = 6
# Places that are looked at between two values of the grid.
BETWEEN = 8
# Peaks whose interpolated decrease is at least this share of the highest are computed, so many of them at most.
CLOSE = 0.9
MOST = 3
# A peak that is not higher than the values around it by this share is theirs.
GAIN = 1e-5
# A peak is known where a value this near (in log damping) is: between nearer values interpolation has rounding's slope.
NEAR = 0.1
# Between values further apart (in log damping) nothing is interpolated: the optimizer's own may lie far off the grid.
GAP = math.log(1e4)
# Interpolation is trusted where it was right to this share of the largest decrease.
CLOSE_ENOUGH = 0.03

Function = Callable[[float], float]


def peaks(curve: Curve) -> dict[float, float]:
    """Where the decrease peaks between the grid's values: damping to interpolated decrease, the highest first.

    The decrease is interpolated by polynomials through the nearest six values of log slope and log bend over log
    damping; each peak is found by golden section. The decrease itself is for the caller to compute; where it is another
    (`agree`), the curve with the computed values tells more. Peaks that are lower than 0.9 of the highest value, or no
    higher than the grid's values beside them, are left out.
    """
    known = np.isfinite(curve.decrease) & (curve.slope > 0) & (curve.bend > 0)
    if not known.any():
        return {}
    known &= _connected(curve.damping, known)
    places, decrease = np.log(curve.damping[known]), curve.decrease[known]
    if len(places) < 3:
        return {}
    value = _interpolated(places, np.log(curve.slope[known]), np.log(curve.bend[known]))
    looked_at = np.unique(np.concatenate([np.linspace(low, high, BETWEEN + 1) for low, high in _pairs(places)]))
    values = np.array([value(place) for place in looked_at.tolist()])
    found: dict[float, float] = {}
    for i in range(1, len(looked_at) - 1):
        if values[i - 1] < values[i] >= values[i + 1]:
            place = golden_section(value, float(looked_at[i - 1]), float(looked_at[i + 1]))
            if abs(places - place).min() < NEAR:
                continue
            above = np.searchsorted(places, place)
            beside = float(decrease[max(0, above - 1) : above + 1].max())
            if value(place) - beside > GAIN * abs(beside):
                found[place] = value(place)
    best = max([float(decrease.max()), *found.values()])
    chosen = [place for place in found if found[place] >= CLOSE * best]
    return {math.exp(place): found[place] for place in sorted(chosen, key=lambda place: -found[place])[:MOST]}


def agree(curve: Curve, expected: Mapping[float, float]) -> bool:
    """Whether the curve has the expected decreases where they were computed, to 3 % of its largest one."""
    best = float(np.nanmax(curve.decrease))
    known = dict(zip(curve.damping.tolist(), curve.decrease.tolist(), strict=True))
    return all(abs(known[damping] - value) <= CLOSE_ENOUGH * abs(best) for damping, value in expected.items())


def _connected(damping: Values, known: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The longest run of known values without a gap: a polynomial across many decades says nothing, and overflows."""
    places = np.flatnonzero(known)
    runs = np.split(places, np.flatnonzero(np.diff(np.log(damping[places])) > GAP) + 1)
    inside = np.zeros_like(known)
    inside[max(runs, key=len)] = True
    return inside


def _pairs(places: Values) -> list[tuple[float, float]]:
    return list(zip(places[:-1].tolist(), places[1:].tolist(), strict=True))


def _interpolated(places: Values, slope: Values, bend: Values) -> Function:
    """The decrease over log damping, interval by interval from the values nearest to its middle."""
    each: list[tuple[Function, Function]] = []
    for low, high in _pairs(places):
        near = np.sort(np.argsort(abs(places - (low + high) / 2), kind="stable")[:NEIGHBOURS])
        each.append((_polynomial(places[near], slope[near]), _polynomial(places[near], bend[near])))
    inner = places[1:-1]

    def value(place: float) -> float:
        log_slope, log_bend = each[int(np.searchsorted(inner, place))]
        return math.exp(log_slope(place)) - math.exp(log_bend(place)) / 2

    return value


def golden_section(function: Function, low: float, high: float, tolerance: float = 5e-3) -> float:
    """The place of the largest value of a unimodal function between two ends, to within the tolerance."""
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left < at_right:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = function(right)
        else:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = function(left)
    return (low + high) / 2


def _polynomial(places: Values, values: Values) -> Function:
    """The polynomial through the points, in Newton's form."""
    xs, coefficients = places.tolist(), values.tolist()
    for step in range(1, len(xs)):
        for i in range(len(xs) - 1, step - 1, -1):
            coefficients[i] = (coefficients[i] - coefficients[i - 1]) / (xs[i] - xs[i - step])

    def at(place: float) -> float:
        value = 0.0
        for x, coefficient in zip(reversed(xs), reversed(coefficients), strict=True):
            value = value * (place - x) + coefficient
        return float(value)

    return at
