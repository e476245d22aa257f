"""Signs of the next step against torch's own optimizers, and of the moments against their formulas."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.records import StabilityRow
from tests import models

N = 12


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (N,), generator=generator)


def gradient_of(model: nn.Module) -> None:
    model.zero_grad()
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()


def trained(kind: type[torch.optim.Optimizer], steps: int = 3, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = models.mlp(4, 5, 3).double()
    optimizer: Any = kind(model.parameters(), **options)
    for _ in range(steps):
        gradient_of(model)
        optimizer.step()
    return model, optimizer


def rows(run: Any, quantity: str) -> dict[str, StabilityRow]:
    return {row.layer: row for row in run.tables["stability"] if row.quantity == quantity}


def analyze(model: nn.Module, optimizer: Any) -> Any:
    return curvscope.analyze(model, batch(), loss="cross_entropy", optimizer=optimizer, dtype="float64")


OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_ratio_is_that_of_the_step_torch_takes(name: str) -> None:
    kind, options = OPTIMIZERS[name]
    model, optimizer = trained(kind, **options)
    run = analyze(model, optimizer)
    after, stepping = copy.deepcopy((model, optimizer))
    gradient_of(after)
    stepping.step()
    new = {n: p.detach() for n, p in after.named_parameters()}
    for layer in ("0", "2", ""):
        old = {n: p.detach() for n, p in model.named_parameters() if n.startswith(layer)}
        moved = sum(float((new[n] - p).square().sum()) for n, p in old.items())
        size = sum(float(p.square().sum()) for p in old.values())
        assert rows(run, "update_ratio")[layer].value == pytest.approx((moved / size) ** 0.5, rel=1e-7)


def test_the_step_of_kfac_divides_by_its_damped_factors() -> None:
    torch.manual_seed(0)
    model = models.mlp(4, 5, 3).double()
    run = analyze(model, {"kind": "kfac", "lr": 0.3, "damping": 0.05})
    gradient_of(model)
    for layer, module in (("0", model[0]), ("2", model[2])):
        factors = run.layers[layer].factors["expand"]
        P = torch.kron(torch.tensor(factors.B), torch.tensor(factors.A)) + 0.05 * torch.eye(
            factors.B.shape[0] * factors.A.shape[0], dtype=torch.float64
        )
        g = torch.cat([module.weight.grad, module.bias.grad[:, None]], dim=1).flatten()
        weights = torch.cat([module.weight, module.bias[:, None]], dim=1).detach()
        expected = float(0.3 * torch.linalg.solve(P, g).norm() / weights.norm())
        found = rows(run, "update_ratio")[layer]
        assert found.value == pytest.approx(expected, rel=1e-7)
        assert "without momentum" in found.reason


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_update_rms_follows_the_paper(scale: float) -> None:
    """sqrt(mean(g^2 / max(v, eps^2))), v with g taken in and without its bias."""
    model, optimizer = trained(torch.optim.Adam, steps=40, lr=0.0, betas=(0.9, 0.99), eps=1e-8)
    with torch.no_grad():
        for state in optimizer.state.values():
            state["exp_avg_sq"] /= scale**2
    run = analyze(model, optimizer)
    gradient_of(model)
    total, size = 0.0, 0
    for p in model.parameters():
        assert p.grad is not None
        g = p.grad
        v = (0.99 * optimizer.state[p]["exp_avg_sq"] + 0.01 * g**2) / (1 - 0.99**41)
        total += float((g**2 / v).sum())
        size += g.numel()
    row = rows(run, "update_rms")[""]
    assert row.value == pytest.approx((total / size) ** 0.5, rel=1e-9)
    assert row.low <= row.value <= row.high
    assert (row.verdict == "above") == (scale > 1)
    assert ("CS505" in {one.code for one in run.findings}) == (scale > 1)


@pytest.mark.parametrize(("eps", "told"), [(1e-8, False), (1.0, True)])
def test_eps_against_the_moments(eps: float, told: bool) -> None:
    model, optimizer = trained(torch.optim.Adam, lr=1e-3, eps=eps)
    run = analyze(model, optimizer)
    assert rows(run, "eps_share")[""].value == (1.0 if told else 0.0)
    assert ("CS506" in {one.code for one in run.findings}) == told


@pytest.mark.parametrize(("beta2", "told"), [(0.82, False), (0.80, True)])
def test_beta1_against_beta2(beta2: float, told: bool) -> None:
    model, optimizer = trained(torch.optim.Adam, lr=1e-3, betas=(0.9, beta2))
    run = analyze(model, optimizer)
    assert rows(run, "beta1_over_root_beta2")[""].value == pytest.approx(0.9 / math.sqrt(beta2))
    assert ("CS507" in {one.code for one in run.findings}) == told


def test_a_rate_is_compared_with_the_other_layers() -> None:
    torch.manual_seed(0)
    model = models.mlp(4, 5, 6, 3).double()
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=1e-3)
    optimizer.param_groups[2]["lr"] = 1e-2  # the weight of the second layer
    run = analyze(model, optimizer)
    assert {name: row.value for name, row in rows(run, "learning_rate_ratio").items()} == pytest.approx(
        {"0": 1.0, "2": 10.0, "4": 1.0}
    )
    assert [row.layer for row in run.findings if row.code == "CS504"] == ["2"]


def test_early_steps_of_adam_are_no_warning() -> None:
    """After one step P is about to grow tenfold: what is above now and not then is info."""
    model, optimizer = trained(torch.optim.Adam, steps=1, lr=1e-3)
    assert rows(analyze(model, optimizer), "early_moments")[""].value == pytest.approx(10.0)
    rates = rows(analyze(model, optimizer), "largest_stable_lr")[""]
    for factor, severity in ((2.0, "info"), (1000.0, "error")):
        for group in optimizer.param_groups:
            group["lr"] = factor * rates.high
        run = analyze(model, optimizer)
        (row,) = [one for one in run.findings if one.code == "CS501"]
        assert row.severity == severity
        assert ("this step alone" in row.evidence) == (severity == "info")


def test_what_the_state_lacks_is_not_assessed() -> None:
    model = models.mlp(4, 5, 3).double()
    run = analyze(model, torch.optim.Adam(model.parameters()))
    for quantity in ("update_ratio", "update_rms", "eps_share"):
        assert rows(run, quantity)[""].verdict == "not_assessed"
        assert "took no step yet" in rows(run, quantity)[""].reason
