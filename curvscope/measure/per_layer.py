"""A damping for each layer in a step of all layers together: its own best times one common factor.

A layer's own best value holds where that layer moves alone. Together the steps add up, so that all of them are raised
by one factor, the safe one with the lowest objective. The search goes up by decades as long as no factor is safe or the
largest is the best, and ends where a larger one has nothing left to change: at a safe step that is plain gradient
descent already, which it could only shorten, or where the layers hardly move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from curvscope.measure.network import Vector
from curvscope.measure.parts import LayerPart, parameters_of
from curvscope.measure.ranges import PLAIN
from curvscope.measure.recommend import lowest_safe
from curvscope.measure.steps import Step

# Tried in any case; the search goes on from the last.
FACTORS = (0.1, 1.0, 10.0)
# The layers hardly move where the gradient along their steps is under this share of that along the step of one value.
NOTHING = 0.01
HARDLY = "where these layers hardly move any more"


@dataclass(frozen=True)
class Chosen:
    """The factor and its step, or why there is none."""

    factor: float
    step: Step | None
    why: str = ""


@dataclass(frozen=True)
class _Tried:
    """`distance` is ||lam delta + R|| / ||R|| over the layers with a value of their own, `slope` their R . delta."""

    step: Step
    distance: float
    slope: float


def search(
    parts: Sequence[LayerPart],
    own: Mapping[str, float],
    elsewhere: float,
    judged: Callable[[Mapping[str, float]], Step],
    verdict: Callable[[Step], tuple[bool | None, float]],
    right: Vector,
    reference: float,
) -> Chosen:
    """The safe common factor on the layers' own dampings with the lowest objective, of those tried.

    Args:
        parts: all layers that move.
        own: the best damping of each layer, if it moves alone.
        elsewhere: the damping of layers without one.
        judged: from dampings by layer to their step.
        verdict: of a step: whether it is safe (None: can't be told), and its change of the objective.
        right: the gradient R of the objective.
        reference: R . delta of the step of one value for all.
    """
    found: dict[float, _Tried] = {}

    def judge(factor: float) -> tuple[bool | None, float]:
        dampings = {name: damping * factor for name, damping in own.items()}
        step = judged({part.spec.name: elsewhere for part in parts} | dampings)
        found[factor] = _Tried(step, *gradient_distance(parts, dampings, step.vector, right))
        return verdict(step)

    def further(factor: float) -> bool:
        one = found[factor]
        # also of what is not finite nothing more is tried
        if not abs(one.slope) >= NOTHING * abs(reference):
            return False
        return not (one.distance < PLAIN and verdict(one.step)[0])

    _, factor = lowest_safe(FACTORS, judge, further=further, halvings=2)
    if math.isnan(factor):
        why = f"dampings of each layer's own are not safe together, up to {max(found):g} times themselves, {HARDLY}"
        return Chosen(factor, None, why)
    return Chosen(factor, found[factor].step)


def gradient_distance(
    parts: Sequence[LayerPart], dampings: Mapping[str, float], step: Vector, right: Vector
) -> tuple[float, float]:
    """||lam delta + R|| / ||R||, lam by layer, and R . delta, over the layers of `dampings`; 0 where R is zero there.

    0: every layer takes a plain gradient step of rate 1 / lam.
    """
    apart = size = slope = 0.0
    for part in parts:
        damping = dampings.get(part.spec.name, math.nan)
        for name in parameters_of(part.spec) if part.spec.name in dampings else ():
            if name in step and name in right:
                delta, gradient = step[name].double(), right[name].double()
                apart += float((damping * delta + gradient).square().sum())
                size += float(gradient.square().sum())
                slope += float((gradient * delta).sum())
    return math.sqrt(apart / size) if size > 0 else 0.0, slope
