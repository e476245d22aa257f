"""The search for a common factor, on gradient steps whose verdicts are made up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from curvscope.measure import per_layer
from curvscope.measure.steps import Step

RIGHT = {"w": torch.tensor([3.0, 4.0], dtype=torch.float64)}
OWN = 2.0


def searched(safe_from: float, curvature: float) -> tuple[per_layer.Chosen, list[float]]:
    """One layer with G = curvature I; its steps are said to be safe from a factor on. Also the factors tried."""
    spec = SimpleNamespace(name="layer", exact_only=False, weight="w", bias=None)
    part: Any = SimpleNamespace(spec=spec)
    tried = []

    def judged(dampings: Mapping[str, float]) -> Step:
        damping = dampings["layer"]
        tried.append(damping / OWN)
        step = {"w": -RIGHT["w"] / (damping + curvature)}
        return Step(step, 0.0, 0.0, -1.0 / damping, float(step["w"].norm()), 1.0)

    def verdict(step: Step) -> tuple[bool | None, float]:
        factor = -1.0 / step.actual / OWN
        return factor >= safe_from, step.actual

    reference = -float(RIGHT["w"] @ RIGHT["w"]) / OWN
    return per_layer.search([part], {"layer": OWN}, OWN, judged, verdict, RIGHT, reference), tried


def test_no_factor_is_safe_before_the_layers_hardly_move() -> None:
    chosen, tried = searched(math.inf, 0.0)
    assert math.isnan(chosen.factor)
    assert chosen.step is None
    # at 100 the slope is 1 % of that of one value, at 1,000 a tenth of it
    assert max(tried) == pytest.approx(1000)
    assert chosen.why.endswith(
        "not safe together, up to 1000 times themselves, where these layers hardly move any more"
    )


def test_a_safe_gradient_step_ends_the_search() -> None:
    """Safe from 10 on, where lam delta + R is 1 % of R: a larger factor could only shorten the step."""
    chosen, tried = searched(10.0, 0.2)
    assert max(tried) == pytest.approx(10)
    assert 1.0 < chosen.factor <= 10.0


def test_an_unsafe_gradient_step_does_not_end_it() -> None:
    chosen, tried = searched(50.0, 0.2)
    assert max(tried) == pytest.approx(100)
    assert 50.0 <= chosen.factor <= 100.0
