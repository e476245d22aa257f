"""Which damping to take: the safe range by rho, the lowest objective within it and at all, where a step is -gradient.

The recommended damping has the lowest objective after one step of all that were tried. The safe one, which findings
advise, has the lowest of those that the Levenberg-Marquardt rule takes: a step of which the quadratic model predicts a
decrease, and that keeps a quarter of it. The recommended step may be one that the model does not predict: a value that
had to be predicted would miss the lowest loss by more than 5 % in many runs (docs/damping.md); its row says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

# The Levenberg-Marquardt rule (arXiv:1503.05671, section 6.5): below the first raise damping, above the other it may
# be lowered.
RAISE, LOWER = 0.25, 0.75
GRADIENT_COSINE = 0.95
DECADE = 10.0
# The safe range's lower end is known well enough where the last point that is not safe is within this ratio of it.
NARROW = 1.25


def lowest(
    change: Callable[[float], float],
    grid: Sequence[float],
    *,
    extend: int = 2,
    middles: bool = True,
    halvings: int = 3,
) -> tuple[float, dict[float, float]]:
    """The damping with the lowest change, and all changes evaluated.

    The grid (ascending, evenly spaced in log) and with `middles` those between its points; up to `extend` points beyond
    an end as long as the end is the lowest; then both neighbours of the lowest at each halving of the distance.
    """
    ratio = (grid[-1] / grid[0]) ** (1 / (len(grid) - 1))
    found: dict[float, float] = {}

    def value(damping: float) -> float:
        near = next((known for known in found if math.isclose(known, damping, rel_tol=1e-6)), None)
        if near is None:
            got = change(damping)
            near, found[damping] = damping, got if math.isfinite(got) else math.inf
        return found[near]

    for damping in grid:
        value(damping)
    for damping in grid[:-1] if middles else ():
        value(damping * ratio**0.5)
    for _ in range(extend):
        best = min(found, key=lambda damping: found[damping])
        if best in (min(found), max(found)):
            value(best * ratio if best == max(found) else best / ratio)
    for halving in range(1, halvings + 1):
        best = min(found, key=lambda damping: found[damping])
        for power in (-1, 1):
            value(best * ratio ** (power * 0.5**halving))
    return min(found, key=lambda damping: found[damping]), found


def lowest_safe(
    points: Sequence[float],
    judge: Callable[[float], tuple[bool | None, float]],
    *,
    further: Callable[[float], bool] = lambda point: False,
    bisections: int = 3,
    halvings: int = 0,
) -> tuple[float, float]:
    """(where the safe range begins, the point in it with the lowest change); NaN where there is none.

    `judge` says of a point whether it is safe (None: can't be told) and its change. Points more: by decades beyond the
    largest as long as that is the lowest safe one or none is, and `further` says of it that it may be exceeded;
    `bisections` between the range's lower end and the last point that is not safe; both neighbours of the lowest at
    each of the `halvings` of a decade, up to the largest.
    """
    found = {point: judge(point) for point in points}

    def known() -> tuple[float, float]:
        edge = holds_from({point: safe for point, (safe, _) in found.items() if safe is not None})
        inside = {point: change for point, (safe, change) in found.items() if safe and point >= edge}
        return edge, min(inside, key=lambda point: inside[point], default=math.nan)

    while not known()[1] < max(found) and further(max(found)):
        point = max(found) * DECADE
        found[point] = judge(point)
    for _ in range(bisections):
        edge, _ = known()
        below = max((point for point, (safe, _) in found.items() if safe is False and point < edge), default=math.nan)
        if math.isnan(below) or edge / below < NARROW:
            break
        point = math.sqrt(edge * below)
        found[point] = judge(point)
    largest = max(found)
    for halving in range(1, halvings + 1):
        edge, best = known()
        for power in (-1, 1):
            point = best * DECADE ** (power * 0.5**halving)
            # a point below the edge that turns out safe moves it
            if not any(math.isclose(point, other, rel_tol=1e-6) for other in found) and edge <= point <= largest:
                found[point] = judge(point)
    return known()


def holds_from(flags: Mapping[float, bool]) -> float:
    """The least damping from which on the flag holds for every one tried; NaN where it fails at the largest."""
    least = math.nan
    for damping in sorted(flags, reverse=True):
        if not flags[damping]:
            break
        least = damping
    return least
