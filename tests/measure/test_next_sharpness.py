"""The sharpness under the moments that the very next step divides by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import functional_call, hessian

import curvscope


def trained(tokens: int) -> tuple[Any, Any, Any]:
    """A look-up trained with Adam on the first 10 tokens, and a batch that has the first `tokens` of them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(12, 3), torch.nn.Flatten(), torch.nn.Linear(6, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(20):
        x = torch.randint(0, 10, (16, 2))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), x.sum(1) % 3).backward()
        optimizer.step()
    x = torch.arange(48).remainder(tokens).view(24, 2)
    return model, optimizer, (x, x.sum(1) % 3)


def network_rows(model: Any, optimizer: Any, batch: Any) -> dict[str, Any]:
    run = curvscope.analyze(
        model, batch, loss="cross_entropy", optimizer=optimizer, dtype="float64", measure=("stability",)
    )
    return {row.quantity: row for row in run.tables["stability"] if row.scope == "network"}


def test_it_is_that_of_the_step_that_torch_takes_next() -> None:
    """Dense Hessian over the P that torch's own Adam has after a step on this batch."""
    model, optimizer, (x, y) = trained(12)
    found = network_rows(model, optimizer, (x, y))
    assert found["preconditioned_sharpness"].verdict == "above"
    names = [name for name, _ in model.named_parameters()]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([before[name].numel() for name in names])
        given = {name: part.view_as(before[name]) for name, part in zip(names, parts, strict=True)}
        return torch.nn.functional.cross_entropy(functional_call(model, given, (x,)), y)

    H = hessian(loss)(torch.cat([before[name].flatten() for name in names]))
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    t = 21
    P = torch.cat(
        [
            (1 - 0.9**t) * ((optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**t)).sqrt() + 1e-8).flatten()
            for p in model.parameters()
        ]
    )
    top = float(torch.linalg.eigvalsh(P.rsqrt()[:, None] * H * P.rsqrt()).max())
    row = found["next_sharpness"]
    assert row.value == pytest.approx(top, rel=1e-3)
    assert row.verdict == "below"
    assert found["preconditioned_sharpness"].value > 100 * row.value


def test_a_network_that_is_not_above_is_not_asked() -> None:
    model, optimizer, batch = trained(10)
    found = network_rows(model, optimizer, batch)
    assert found["preconditioned_sharpness"].verdict != "above"
    assert "next_sharpness" not in found
