"""Which bound on memory would do for what a plan leaves out, found by planning again under larger ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from curvscope.extract.plan import NO_COLUMNS, NO_DAMPING, NO_DUMP, LayerPlan, Plan, size_in_words

# Bounds are tried up to this many times the one that is too small, each larger than the last by this factor.
MOST = 2**10
STEP = 1.04
MIB = 2**20
# What may be left out of a layer: the field that says why, and with which words.
LEFT_OUT = {"reason": NO_COLUMNS, "no_damping": NO_DAMPING, "no_dump": NO_DUMP}
PlanUnder = Callable[[int], Plan]


def told(plan: Plan, plan_under: PlanUnder, bound: int, aside: Collection[str] = ()) -> Plan:
    """The plan; of what it leaves out for lack of memory it says which bound would do, for every layer and all of it.

    Args:
        plan: what fits under `bound`.
        plan_under: the plan under another bound, in bytes.
        bound: bytes, as --memory gives them.
        aside: layers that are left out under any bound.
    """
    layers = dict(plan.layers)
    for field, words in LEFT_OUT.items():
        missing = [name for name, layer in plan.layers.items() if name not in aside and _lacks(layer, field)]
        enough = least_bound(partial(_fits, plan_under, missing, field), bound) if missing else None
        said = f"{words} {size_in_words(bound)}" + (f": {size_in_words(enough)} would do" if enough else "")
        layers |= {name: _with(layers[name], field, said) for name in missing}
    return replace(plan, layers=layers)


def _fits(plan_under: PlanUnder, names: Sequence[str], field: str, bound: int) -> bool:
    """Whether the bound leaves nothing out of the layers, damped steps of missing columns included."""
    layers = plan_under(bound).layers
    fields = LEFT_OUT if field == "reason" else {field}
    return all(layers[name].form is not None and not any(_lacks(layers[name], f) for f in fields) for name in names)


def _with(layer: LayerPlan, field: str, words: str) -> LayerPlan:
    changed: dict[str, Any] = {field: words}
    return replace(layer, **changed)


def least_bound(fits: Callable[[int], bool], bound: int) -> int | None:
    """The least of the bounds tried above `bound` that fits, a round number; None where the largest does not."""
    tried = bound
    while tried < MOST * bound:
        tried = _round(max(tried * STEP, tried + MIB))
        if fits(tried):
            return tried
    return None


def nothing_left_out(plan: Plan, aside: Collection[str] = ()) -> bool:
    """Whether memory leaves nothing out of the layers, those `aside` aside."""
    layers = [layer for name, layer in plan.layers.items() if name not in aside]
    return not any(_lacks(layer, field) for layer in layers for field in LEFT_OUT)


def _lacks(layer: LayerPlan, field: str) -> bool:
    return str(getattr(layer, field)).startswith(LEFT_OUT[field])


def _round(count: float) -> int:
    """Up to a number that its words give in full: whole MiB, hundredths, tenths or whole GiB."""
    unit = MIB if count < 999 * MIB else 1024 * MIB * 10 ** min(0, len(str(int(count // 2**30))) - 3)
    return int(-(-count // unit) * unit) if unit >= 1 else int(count)
