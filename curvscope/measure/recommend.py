"""Which damping to take: the lowest objective after one step, the safe range by rho, where a step is the gradient's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

# The Levenberg-Marquardt rule (arXiv:1503.05671, section 6.5): below the first raise damping, above the other it may
# be lowered.
RAISE, LOWER = 0.25, 0.75
GRADIENT_COSINE = 0.95


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


def holds_from(flags: Mapping[float, bool]) -> float:
    """The least damping from which on the flag holds for every one tried; NaN where it fails at the largest."""
    least = math.nan
    for damping in sorted(flags, reverse=True):
        if not flags[damping]:
            break
        least = damping
    return least
