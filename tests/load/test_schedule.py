"""What a stored scheduler will do, against the real scheduler going on."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as S

from curvscope.load.problem import Schedule
from curvscope.load.schedule import MOST_STEPS, class_of, schedule

KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "step": ("StepLR", lambda o: S.StepLR(o, 3)),
    "milestones": ("MultiStepLR", lambda o: S.MultiStepLR(o, [3, 6, 9], 0.5)),
    "exponential": ("ExponentialLR", lambda o: S.ExponentialLR(o, 0.9)),
    "constant": ("ConstantLR", lambda o: S.ConstantLR(o, 0.1, 9)),
    "linear": ("LinearLR", lambda o: S.LinearLR(o, 0.1, 1.0, 12)),
    "polynomial": ("PolynomialLR", lambda o: S.PolynomialLR(o, 12, 2.0)),
    "cosine": ("CosineAnnealingLR", lambda o: S.CosineAnnealingLR(o, 10, 1e-3)),
    "cosine beyond": ("CosineAnnealingLR", lambda o: S.CosineAnnealingLR(o, 4)),
    "restarts": ("CosineAnnealingWarmRestarts", lambda o: S.CosineAnnealingWarmRestarts(o, 4, 2, 1e-3)),
    "one cycle": ("OneCycleLR", lambda o: S.OneCycleLR(o, [1.0, 0.3], total_steps=30)),
    "three phases": ("OneCycleLR", lambda o: S.OneCycleLR(o, 1.0, total_steps=30, three_phase=True)),
    "linear cycle": (
        "OneCycleLR",
        lambda o: S.OneCycleLR(o, 1.0, total_steps=30, anneal_strategy="linear", cycle_momentum=False),
    ),
    "cyclic": ("CyclicLR", lambda o: S.CyclicLR(o, 0.01, [0.5, 0.7], 6, 3, mode="triangular2")),
    "exp range": ("CyclicLR", lambda o: S.CyclicLR(o, 0.01, 0.5, 6, mode="exp_range", gamma=0.9)),
    "warm-up, cosine": (
        "SequentialLR",
        lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.01, total_iters=9), S.CosineAnnealingLR(o, 20)], [9]),
    ),
    "warm-up, done": (
        "SequentialLR",
        lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.01, total_iters=3), S.StepLR(o, 5)], [3]),
    ),
    "chained": (
        "ChainedScheduler",
        lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.1, 9), S.ExponentialLR(o, 0.9)], o),
    ),
    "plateau": ("ReduceLROnPlateau", lambda o: S.ReduceLROnPlateau(o)),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1),
}


def groups() -> list[dict[str, Any]]:
    return [{"params": [nn.Parameter(torch.zeros(2))]}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.03}]


def stored(value: Any) -> Any:
    """Through a file, as plain data."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def after(make: Any, optimizer: torch.optim.Optimizer, steps: int) -> tuple[Any, Schedule]:
    """The real scheduler after some steps, and what its file says of the rest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = make(optimizer)
        for _ in range(steps):
            optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, S.ReduceLROnPlateau) else []))
    found = schedule(stored(scheduler.state_dict()), stored(optimizer.state_dict())["param_groups"])
    return scheduler, found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_rates_ahead_are_the_real_ones(kind: str, optimizer: str) -> None:
    name, make = KINDS[kind]
    real = OPTIMIZERS[optimizer](groups())
    scheduler, found = after(make, real, 5)
    assert (found.name, found.problem, found.cut) == (name, "", False)
    for row, momenta in zip(found.rates, found.momenta, strict=True):
        assert row.tolist() == [float(group["lr"]) for group in real.param_groups]
        assert momenta.tolist() == [
            group["momentum"] if optimizer == "sgd" else group["betas"][0] for group in real.param_groups
        ]
        if len(found.rates) > 1:
            scheduler.step()


# Where the highest rate of the first group lies, in steps from the fifth on.
PEAKS = {
    "step": (0, 0.01),
    "cosine": (0, None),
    "cosine beyond": (3, 0.1),
    "restarts": (7, 0.1),
    "one cycle": (3, 1.0),
    "linear": (7, 0.1),
    "warm-up, cosine": (4, 0.1),
    "cyclic": (1, 0.5),
    "constant": (4, 0.1),
}


@pytest.mark.parametrize("kind", PEAKS)
def test_the_peak(kind: str) -> None:
    _, found = after(KINDS[kind][1], OPTIMIZERS["sgd"](groups()), 5)
    at, rate = PEAKS[kind]
    first = found.rates[:, 0]
    assert int(first.argmax()) == at
    if rate is not None:
        assert float(first.max()) == pytest.approx(rate, rel=1e-6)


UNKNOWN = {
    "lambda": (lambda o: S.LambdaLR(o, lambda step: 0.9**step), "functions are not in the file"),
    "multiplied": (lambda o: S.MultiplicativeLR(o, lambda step: 0.9), "functions are not in the file"),
    "custom": (
        lambda o: S.CyclicLR(o, 0.01, 0.5, 6, scale_fn=lambda x: 0.5 / x, mode="triangular"),
        "functions are not in the file",
    ),
    "in a sequence": (
        lambda o: S.SequentialLR(o, [S.LambdaLR(o, lambda step: 0.9**step), S.StepLR(o, 3)], [9]),
        "functions are not in the file",
    ),
    "endless": (lambda o: S.ExponentialLR(o, 1.1), "without end (gamma 1.1)"),
    "averaging": (lambda o: torch.optim.swa_utils.SWALR(o, 0.5), "none of torch's own kinds"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_is_not_known_says_why(kind: str) -> None:
    make, words = UNKNOWN[kind]
    _, found = after(make, OPTIMIZERS["sgd"](groups()), 2)
    assert words in found.problem
    assert len(found.rates) == (2 if found.assumed else 1)
    assert found.rates[0].isfinite().all()


def test_a_warm_up_by_a_function_is_taken_to_its_base() -> None:
    _, found = after(lambda o: S.LambdaLR(o, lambda step: min(1.0, (step + 1) / 10)), OPTIMIZERS["sgd"](groups()), 2)
    assert found.assumed
    assert found.rates.tolist() == [pytest.approx([0.03, 0.009]), [0.1, 0.03]]
    assert "its base rate is its peak" in found.problem


@pytest.mark.parametrize(
    "changed",
    [{"gamma": "x"}, {"base_lrs": None, "gamma": None}, {"last_epoch": "two"}],
    ids=lambda changed: ",".join(changed),
)
def test_a_damaged_state_is_told(changed: dict[str, Any]) -> None:
    optimizer = OPTIMIZERS["sgd"](groups())
    state = {**S.StepLR(optimizer, 3).state_dict(), **changed}
    found = schedule(state, optimizer.state_dict()["param_groups"])
    assert "its state can't be" in found.problem


def test_other_rates_than_the_optimizers_are_told() -> None:
    optimizer = OPTIMIZERS["sgd"](groups())
    state = S.OneCycleLR(optimizer, 1.0, total_steps=30).state_dict()
    optimizer.param_groups[1]["lr"] = 0.7
    found = schedule(state, optimizer.state_dict()["param_groups"])
    assert "(0.04, 0.04) is not the optimizer's" in found.problem


def test_a_long_schedule_is_cut() -> None:
    optimizer = OPTIMIZERS["sgd"](groups())
    found = schedule(
        S.LinearLR(optimizer, 0.1, total_iters=MOST_STEPS + 1).state_dict(), optimizer.state_dict()["param_groups"]
    )
    assert found.cut
    assert len(found.rates) == MOST_STEPS + 1


def test_no_class_without_its_keys() -> None:
    assert class_of({"last_epoch": 3}) == "a scheduler"
