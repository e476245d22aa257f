"""Every threshold against the naive simulation of its optimizer on a one-dimensional quadratic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from curvscope.load.optimizer_settings import ParameterSettings
from curvscope.measure.thresholds import Dynamics, dynamics, rule

LR = 0.1


def sgd(x: float, m: float, g: float) -> tuple[float, float]:
    return x - LR * g, 0.0


def heavy(x: float, m: float, g: float) -> tuple[float, float]:
    m = 0.9 * m + (1 - 0.25) * g
    return x - LR * m, m


def nesterov(x: float, m: float, g: float) -> tuple[float, float]:
    m = 0.9 * m + g
    return x - LR * (g + 0.9 * m), m


def adam(x: float, m: float, g: float) -> tuple[float, float]:
    m = 0.8 * m + 0.2 * g
    return x - LR * m, m


def adamw(x: float, m: float, g: float) -> tuple[float, float]:
    m = 0.8 * m + 0.2 * g
    return x * (1 - LR * 2.0) - LR * m, m


def nadam(x: float, m: float, g: float) -> tuple[float, float]:
    mu, coming = (0.8 * (1 - 0.5 * 0.96 ** (t * 0.004)) for t in (7, 8))
    m = 0.8 * m + 0.2 * g
    return x - LR * ((1 - mu) / (1 - 0.3) * g + coming / (1 - 0.3 * coming) * m), m


Step = Callable[[float, float, float], tuple[float, float]]
CASES: dict[str, tuple[str, ParameterSettings, Step, float]] = {
    "sgd": ("sgd", ParameterSettings(LR), sgd, 2 / LR),
    "heavy ball": (
        "sgd",
        ParameterSettings(LR, momentum=0.9, dampening=0.25),
        heavy,
        2 * (1 + 0.9) / LR / (1 - 0.25),
    ),
    "nesterov": (
        "sgd",
        ParameterSettings(LR, momentum=0.9, nesterov=True),
        nesterov,
        2 * (1 + 0.9) / ((1 + 2 * 0.9) * LR),
    ),
    "adam": ("adam", ParameterSettings(LR, beta1=0.8), adam, (2 + 2 * 0.8) / ((1 - 0.8) * LR)),
    "adamw": (
        "adamw",
        ParameterSettings(LR, beta1=0.8, weight_decay=2.0, decoupled=True),
        adamw,
        (1 + 0.8) * (2 - LR * 2.0) / ((1 - 0.8) * LR),
    ),
    "nadam": (
        "nadam",
        ParameterSettings(
            LR, beta1=0.8, momentum_decay=0.004, step=7, moments={"mu_product": torch.tensor(0.3, dtype=torch.float64)}
        ),
        nadam,
        float("nan"),
    ),
    "rmsprop": ("rmsprop", ParameterSettings(LR), sgd, 2 / LR),
    "adagrad": ("adagrad", ParameterSettings(2 * LR, lr_decay=0.25, step=5), sgd, 2 / LR),
    "kfac": ("kfac", ParameterSettings(LR), sgd, 2 / LR),
    "shampoo": ("shampoo", ParameterSettings(LR), sgd, 2 / LR),
}


def radius(step: Step, h: float) -> float:
    """The spectral radius of the step as a linear map, by applying it to the unit vectors."""
    columns = [step(x, m, h * x) for x, m in ((1.0, 0.0), (0.0, 1.0))]
    return float(torch.linalg.eigvals(torch.tensor(columns, dtype=torch.float64).T).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_stable_up_to_the_threshold_and_not_beyond(name: str) -> None:
    kind, settings, step, formula = CASES[name]
    found = dynamics(kind, settings)
    if name != "nadam":
        assert found.threshold == pytest.approx(formula, rel=1e-14)
    assert radius(step, found.threshold) == pytest.approx(1.0, abs=1e-12)
    for h in (0.05, 0.5, 0.99, 0.9999, 1.0001, 1.01, 2.0):
        assert (radius(step, h * found.threshold) > 1) == (h > 1)


@pytest.mark.parametrize("name", CASES)
def test_growth_is_the_spectral_radius(name: str) -> None:
    kind, settings, step, _ = CASES[name]
    found = dynamics(kind, settings)
    for h in (-0.3, 0.0, 0.1, 0.7, 1.0, 1.3, 4.0):
        assert found.growth(h * found.threshold) == pytest.approx(radius(step, h * found.threshold), rel=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_growth_that_tells_of_no_margin_does_not_move_with_the_sharpness(name: str) -> None:
    kind, settings, step, _ = CASES[name]
    found = dynamics(kind, settings)
    for h in (1e-4, 0.1, 0.5, 0.9, 1.3):
        at, beside = (radius(step, factor * h * found.threshold) for factor in (1.0, 1.01))
        assert found.pinned(h * found.threshold) == (at == pytest.approx(beside, rel=1e-9)), h


@pytest.mark.parametrize("name", CASES)
def test_the_largest_stable_rate(name: str) -> None:
    kind, settings, _, _ = CASES[name]
    found = dynamics(kind, settings)
    assert found.stable_lr(found.threshold) == pytest.approx(found.lr, rel=1e-12)
    lower = Dynamics(found.lr / 3, found.retained, found.entering, found.averaged, found.direct, decay=found.decay / 3)
    assert found.stable_lr(lower.threshold) == pytest.approx(lower.lr, rel=1e-12)
    assert found.stable_lr(0.0) == float("inf")


def test_every_rule_names_its_source() -> None:
    for kind, settings, *_ in CASES.values():
        assert "arXiv" in rule(kind, settings) or kind in ("nadam", "kfac", "shampoo")


@pytest.mark.parametrize("lr", [1e160, 1e300])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_growth_of_an_absurd_rate_is_still_a_number(lr: float, momentum: float, nesterov: bool) -> None:
    given = dynamics("sgd", ParameterSettings(lr, momentum=momentum, nesterov=nesterov))
    # all but the pull is lost beside it
    pull = 1 + momentum if nesterov else 1
    assert given.growth(3.0) == pytest.approx(3 * pull * lr, rel=1e-12)
    assert not given.pinned(3.0)
    assert given.growth(1e200) == float("inf")
