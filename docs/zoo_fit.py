"""Thresholds that are choices, set on some programs by a rule, to be judged on another.

One threshold after the other, in the order of `GRIDS` and twice through, takes the value that is worth most with the
others held: first by (share of sick found - share of healthy alarmed), then by the share of sick whose cause comes
first. Of several that are worth the same the middle of the longest run of neighbours is taken, the lower of two. Each starts at
the middle of its grid, not at the value that is shipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from fractions import Fraction

from curvscope.diagnose.thresholds import Thresholds
from docs.zoo_cases import Case, Said, said

GRIDS: dict[str, tuple[float, ...]] = {
    "far": (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0),
    "out_of_step": (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
    "weight_scale": (1.0, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0),
    "input_scale": (2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0),
    "odd_example": (3.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0),
    "carries": (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9),
    "learning_rate_ratio": (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0),
    "part": (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5),
    "dead_units": (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9),
    "dead": (0.5, 0.6, 0.75, 0.9, 0.95, 0.98, 1.0),
    "saturated_units": (0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.99),
    "recurrent_radius": (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0),
    "explodes": (1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0),
    "attention_logit": (5.0, 10.0, 25.0, 50.0, 100.0, 200.0, 400.0),
    "attention_collapse": (0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.99),
    "signal_drift": (2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 50.0),
    "eps_share": (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95),
    "update_ratio": (0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5),
    "large_step": (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0),
    "lost": (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5),
}
SWEEPS = 2
RULES = {one.name for one in fields(Thresholds)}
Values = Mapping[str, float]
Worth = tuple[Fraction, Fraction]


def thresholds(values: Values) -> Thresholds:
    """Those of the rules and those of the signs, from one mapping."""
    own = {name: value for name, value in values.items() if name in RULES}
    return Thresholds(**own, limits={name: value for name, value in values.items() if name not in RULES})  # type: ignore[arg-type]


def worth(results: Sequence[Said]) -> Worth:
    """(share of sick found - share of healthy alarmed, share of sick whose cause comes first)."""
    sick = [one for one in results if one.case.sick]
    healthy = [one for one in results if not one.case.sick]
    found = share(sum(bool(one.alarms) for one in sick), len(sick))
    return found - share(sum(bool(one.alarms) for one in healthy), len(healthy)), share(
        sum(one.cause for one in sick), len(sick)
    )


def share(part: int, whole: int) -> Fraction:
    """Their ratio, zero of nothing."""
    return Fraction(part, whole) if whole else Fraction(0)


def middle_of_best(worths: Sequence[Worth]) -> int:
    """The middle of the longest run of the largest, the first of equal runs and the lower of two middles."""
    best, longest, start = max(worths), (0, 0), 0
    for index, value in enumerate([*worths, None]):
        if value != best:
            if index - start > longest[1] - longest[0]:
                longest = (start, index)
            start = index + 1
    return (longest[0] + longest[1] - 1) // 2


def fitted(cases: Sequence[Case], grids: Mapping[str, Sequence[float]] = GRIDS) -> dict[str, float]:
    """The thresholds that the rule above sets on these cases, by name."""
    values = {name: grid[(len(grid) - 1) // 2] for name, grid in grids.items()}
    for _ in range(SWEEPS):
        for name, grid in grids.items():
            tried = [worth([said(case, thresholds(values | {name: value})) for case in cases]) for value in grid]
            values[name] = grid[middle_of_best(tried)]
    return values
