"""Clipping and schedules: what real torch steps do under them, and what the table says."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as S

import curvscope
from curvscope.load.optimizer import as_optimizer_state
from curvscope.load.optimizer_settings import optimizer_settings
from curvscope.load.problem import Schedule
from curvscope.measure.preconditioner import Preconditioner, preconditioner
from curvscope.measure.stability import Spread
from curvscope.measure.surroundings import clip_scale, scheduled_row
from curvscope.records import StabilityRow
from tests import models

H, SLOPE, N = 7.0, 100.0, 12
Make = Callable[[Iterable[Any], float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "l2": lambda p, lr: torch.optim.SGD(p, lr=lr, weight_decay=0.3),
    "heavy ball": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, dampening=0.2),
    "nesterov": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.02),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, momentum=0.5),
}


def growth(make: Make, lr: float, bound: float, v: float, steps: int = 60) -> float:
    """Of x in H x^2 / 2 + SLOPE y under real clipped steps, second moments frozen at v; |g| stays SLOPE."""
    x, y = (nn.Parameter(torch.tensor([start], dtype=torch.float64)) for start in (1e-30, 0.0))
    optimizer = make([x, y], lr)
    sizes: list[float] = []
    for _ in range(steps):
        x.grad, y.grad = H * x.detach(), torch.full_like(y, SLOPE)
        nn.utils.clip_grad_norm_([x, y], bound)
        for p in (x, y):
            entry, g = optimizer.state[p], p.grad
            for key, decay in (("exp_avg_sq", 0.999), ("square_avg", 0.99)):
                if (key == "exp_avg_sq") == ("Adam" in type(optimizer).__name__) and not isinstance(
                    optimizer, torch.optim.SGD
                ):
                    entry[key] = (v - (1 - decay) * g.square()) / decay
            if "Adam" in type(optimizer).__name__:
                # so late that bias correction is over
                entry["step"] = torch.tensor(1e6)
                entry.setdefault("exp_avg", torch.zeros_like(p))
            if isinstance(optimizer, torch.optim.RMSprop):
                entry["step"] = torch.tensor(1.0)
                entry.setdefault("momentum_buffer", torch.zeros_like(p))
        optimizer.step()
        sizes.append(float(x.detach().abs()))
    peaks = [max(sizes[k : k + 20]) for k in (20, 40)]
    return (peaks[1] / peaks[0]) ** (1 / 20)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("times", [0.6, 1.3])
def test_growth_under_clipping_is_that_of_the_shortened_gradient(name: str, times: float) -> None:
    make, v, bound = OPTIMIZERS[name], 4.0, 30.0
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make([p], 1.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    model = nn.Module()
    model.p = p
    state = as_optimizer_state(optimizer, model)
    assert state is not None
    entry = state.state_dict["state"][0] if state.state_dict["state"] else {}
    entry |= {"exp_avg_sq": torch.full((1,), v), "square_avg": torch.full((1,), v), "step": torch.tensor(1e6)}

    def linearised(lr: float) -> Preconditioner:
        settings = optimizer_settings(state, {"p": (1,)}, {"lr": lr})
        assert settings is not None
        P = preconditioner(settings, ["p"])
        assert isinstance(P, Preconditioner)
        return P

    scale = clip_scale(SLOPE, bound)
    assert scale == pytest.approx(0.3, rel=1e-6)
    P = linearised(1.0 if name != "adamw" else 0.1)
    decay = next(iter(P.l2.values()))
    seen = (scale * H + decay) * float(P.inverse_root({"p": torch.ones(1)})["p"]) ** 2
    lr = times * P.step.stable_lr(seen)
    predicted = linearised(lr).step.growth(seen)
    assert (predicted > 1) == (times > 1)
    # turning pairs of eigenvalues leave their mark on the peaks of 20 steps
    assert growth(make, lr, bound, v) == pytest.approx(predicted, rel=0.02)


def test_no_clipping_below_the_bound() -> None:
    assert clip_scale(3.0, None) == clip_scale(3.0, 5.0) == clip_scale(0.0, 1.0) == 1.0
    assert clip_scale(10.0, 2.0) == pytest.approx(0.2, rel=1e-6)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (N,), generator=generator)


def net() -> nn.Module:
    torch.manual_seed(0)
    return models.mlp(4, 5, 3).double()


def table(optimizer: Any, model: nn.Module, **more: Any) -> tuple[dict[str, StabilityRow], curvscope.Run]:
    run = curvscope.analyze(model, batch(), loss="cross_entropy", optimizer=optimizer, dtype="float64", **more)
    return {row.quantity: row for row in run.tables["stability"] if row.scope == "network"}, run


def dense(model: nn.Module) -> tuple[Tensor, float]:
    """The Hessian and the gradient's norm, by plain autograd."""
    names, shapes = zip(*[(n, p.shape) for n, p in model.named_parameters()], strict=True)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    x, y = batch()

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        given = {n: q.view(shape) for n, q, shape in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, given, (x,)), y)

    gradient = torch.autograd.functional.jacobian(loss, flat)
    return torch.autograd.functional.hessian(loss, flat), float(gradient.norm())


@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_the_rows_of_clipping(decay: float) -> None:
    model = net()
    matrix, norm = dense(model)
    bound, lr = norm / 4, 0.9
    found, _ = table(torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay), model, clip_norm=bound)
    scale = bound / (norm + 1e-6)
    assert found["clip_scale"].value == pytest.approx(scale, rel=1e-9)
    top = float(torch.linalg.eigvalsh(matrix)[-1])
    short = scale * top + decay
    assert found["preconditioned_sharpness"].value == pytest.approx(top + decay, rel=1e-6)
    row = found["clipped_sharpness"]
    assert row.value == pytest.approx(top + decay, rel=1e-6)
    assert row.value / row.threshold == pytest.approx(short * lr / 2, rel=1e-6)
    assert found["clipped_growth"].value == pytest.approx(abs(1 - lr * short), rel=1e-6)
    assert found["clipped_stable_lr"].value == pytest.approx(2 / short, rel=1e-6)
    rates = found["clipped_stable_lr"]
    assert rates.low < rates.value <= rates.high


def test_decay_of_some_parameters_is_not_shortened() -> None:
    model = net()
    matrix, norm = dense(model)
    groups = [{"params": [model[0].weight], "weight_decay": 2.0}, {"params": [model[0].bias, *model[2].parameters()]}]
    found, _ = table(torch.optim.SGD(groups, lr=0.5), model, clip_norm=norm / 3)
    scale = norm / 3 / (norm + 1e-6)
    decayed = torch.zeros(len(matrix), dtype=torch.float64)
    decayed[:20] = 2.0
    top = float(torch.linalg.eigvalsh(scale * matrix + decayed.diag())[-1])
    assert found["clipped_growth"].value == pytest.approx(abs(1 - 0.5 * top), rel=1e-4)


def test_a_bound_that_does_not_act_changes_nothing() -> None:
    model = net()
    _, norm = dense(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found, _ = table(optimizer, model, clip_norm=1.01 * norm)
    assert found["clip_scale"].value == 1.0
    assert not {"clipped_sharpness", "clipped_growth"} & set(found)
    assert "clip_scale" not in table(optimizer, model)[0]


@pytest.mark.parametrize(("share", "codes"), [(0.3, "below"), (0.99, "above")])
def test_the_finding_names_both_thresholds(share: float, codes: str) -> None:
    model = net()
    matrix, norm = dense(model)
    top = float(torch.linalg.eigvalsh(matrix)[-1])
    found, run = table(torch.optim.SGD(model.parameters(), lr=2 * 2.0 / top), model, clip_norm=share * norm)
    if found["preconditioned_sharpness"].verdict == "above":
        first = next(row for row in run.findings if row.code == "CS501")
        assert found["clipped_sharpness"].verdict == codes
        assert f"{found['preconditioned_sharpness'].threshold:.3g}" in first.evidence
        assert f"{found['clipped_sharpness'].threshold:.3g}" in first.evidence
        assert (first.severity == "warning") or codes == "above"


def test_the_next_step_is_the_clipped_one() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    _, norm = dense(model)
    found, _ = table(optimizer, model, clip_norm=norm / 5)
    after, stepping = copy.deepcopy((model, optimizer))
    after.zero_grad()
    x, y = batch()
    nn.functional.cross_entropy(after(x), y).backward()
    nn.utils.clip_grad_norm_(after.parameters(), norm / 5)
    stepping.step()
    pairs = list(zip(after.parameters(), model.parameters(), strict=True))
    moved = sum(float((new - old).detach().square().sum()) for new, old in pairs)
    size = sum(float(old.detach().square().sum()) for _, old in pairs)
    assert found["update_ratio"].value == pytest.approx((moved / size) ** 0.5, rel=1e-6)


def spread(value: float) -> Spread:
    return Spread(value, value, value, value, 0.0, True, 2)


def planned(optimizer: torch.optim.Optimizer, model: nn.Module, scheduler: Any, sharpness: float) -> StabilityRow:
    state = as_optimizer_state(optimizer, model, scheduler=scheduler)
    settings = optimizer_settings(state, {n: p.shape for n, p in model.named_parameters()})
    assert settings is not None
    P = preconditioner(settings, list(dict(model.named_parameters())))
    assert isinstance(P, Preconditioner), P
    row = scheduled_row(settings, P, spread(sharpness), halved=True)
    assert row is not None
    return row


def stepped(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int, parameters: Iterable[Any] = ()) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            for p in parameters:
                p.grad = torch.ones_like(p)
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize(("sharpness", "expected"), [(1.9, "below"), (2.1, "above")])
def test_a_warm_up_that_leads_over_the_threshold(sharpness: float, expected: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = S.SequentialLR(optimizer, [S.LinearLR(optimizer, 0.1, total_iters=10), S.StepLR(optimizer, 50)], [10])
    stepped(optimizer, scheduler, 3)
    row = planned(optimizer, model, scheduler, sharpness)
    assert (row.verdict, row.value) == (expected, pytest.approx(1.0))
    assert row.threshold == pytest.approx(2 / sharpness)
    assert "SequentialLR: in 7 scheduler steps" in row.reason


def test_the_first_step_over_the_threshold_is_told() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = S.LinearLR(optimizer, 0.1, total_iters=9)
    row = planned(optimizer, model, scheduler, 2 / 0.45)
    rates = [0.1 * k for k in range(1, 11)]
    first = next(k for k, rate in enumerate(rates) if rate > 0.45)
    assert row.reason.endswith(f"from step {first} on")


@pytest.mark.parametrize("cycle", [True, False])
def test_momentum_that_falls_as_the_rate_rises(cycle: bool) -> None:
    """One cycle with Adam: the tightest step is found by Adam's threshold, not by the rate alone."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = S.OneCycleLR(optimizer, 0.1, total_steps=40, cycle_momentum=cycle)
    stepped(optimizer, scheduler, 4, model.parameters())
    real = copy.deepcopy((model, optimizer, scheduler))
    row = planned(optimizer, model, scheduler, 1.0)
    thresholds = []
    for k in range(36):
        group = real[2].optimizer.param_groups[0]
        beta = group["betas"][0]
        thresholds.append(((2 + 2 * beta) / ((1 - beta) * group["lr"]), group["lr"], k))
        if k < 35:
            stepped(real[2].optimizer, real[2], 1)
    low, rate, at = min(thresholds)
    assert row.value == pytest.approx(rate, rel=1e-12)
    assert f"in {at} scheduler steps" in row.reason
    assert row.threshold == pytest.approx(rate * low, rel=1e-9)


@pytest.mark.parametrize(("sharpness", "expected"), [(0.9, "below"), (1.5, "undecided"), (4.1, "above")])
def test_groups_that_rise_by_different_factors(sharpness: float, expected: str) -> None:
    model = net()
    optimizer = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.5)
    state = as_optimizer_state(optimizer, model)
    settings = optimizer_settings(state, {n: p.shape for n, p in model.named_parameters()})
    assert settings is not None
    rates = torch.tensor([[0.5, 0.5], [0.5, 2.0]], dtype=torch.float64)
    object.__setattr__(settings, "schedule", Schedule("CyclicLR", rates, torch.full((2, 2), math.nan)))
    P = preconditioner(settings, list(dict(model.named_parameters())))
    assert isinstance(P, Preconditioner)
    row = scheduled_row(settings, P, spread(sharpness), halved=True)
    assert row is not None
    assert row.verdict == expected


def test_a_falling_rate_is_no_worse_than_now() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    row = planned(optimizer, model, S.CosineAnnealingLR(optimizer, 20), 3.0)
    assert (row.value, row.verdict) == (1.0, "above")
    assert "no step ahead is less stable than this one" in row.reason


@pytest.mark.parametrize("make", [lambda o: S.MultiplicativeLR(o, lambda e: 0.9), lambda o: S.ExponentialLR(o, 1.2)])
def test_a_schedule_that_is_not_known_is_not_assessed(make: Callable[[Any], Any]) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    row = planned(optimizer, model, make(optimizer), 1.0)
    assert (row.status, row.verdict) == ("not_assessed", "not_assessed")
