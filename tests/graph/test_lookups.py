"""Embeddings that change rows as they look them up, or divide their gradients: against torch's own passes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import curvscope
from curvscope.run import Run
from tests import reference

WORDS, WIDTH = 7, 3
OPTIONS: dict[str, Any] = {
    "loss": "cross_entropy",
    "dtype": "float64",
    "fisher": "exact",
    "dump": ("blocks",),
    "time": 1e-3,
}


class Tied(nn.Module):
    """A table whose rows are kept small, and a head that is the same weight: it uses the other rows, too."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH, **options)
        self.mid, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.table(x).cumsum(1))).mean(1))


def problem(**options: Any) -> tuple[Tied, Tensor, Tensor]:
    torch.manual_seed(0)
    ids = torch.tensor([[0, 1, 1], [2, 0, 3], [3, 3, 3], [1, 0, 2]])  # 4, 5 and 6 never occur
    return Tied(**options).double().eval(), ids, torch.tensor([4, 0, 6, 2])


def naive_block(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """Over [d_out, d_in] = [WIDTH, WORDS], the look-up's orientation."""
    H = reference.output_hessian(functional.cross_entropy, model(ids), targets)
    return reference.parameter_block(
        model, ids, targets, functional.cross_entropy, "table.weight", transposed=True, H=H
    )


@pytest.mark.parametrize("given", ["model", "batches", "bundle"])
def test_only_rows_that_are_looked_up_are_rescaled(given: str, tmp_path: Path) -> None:
    model, ids, targets = problem(max_norm=1.0)
    stored = model.table.weight.detach().clone()
    settled = copy.deepcopy(model)
    settled(ids)  # torch's own rescaling
    changed = (settled.table.weight != stored).any(1)
    assert changed[:4].any()
    assert not changed[4:].any()
    assert float(stored[4:].norm(dim=1).max()) > 1.0  # rows that rescaling all would have changed
    run: Run
    if given == "bundle":
        curvscope.capture(tmp_path / "b.pt", model, (ids, targets), loss="cross_entropy")
        run = curvscope.analyze(tmp_path / "b.pt", **{**OPTIONS, "loss": None})
    else:
        batch = (ids, targets) if given == "model" else [(ids[:2], targets[:2]), (ids[2:], targets[2:])]
        run = curvscope.analyze(model, batch, **OPTIONS)
        assert any("max_norm" in note and "table" in note for note in run.notes)
    G = naive_block(settled, ids, targets).numpy()
    np.testing.assert_allclose(run.layers["table"].block, G, rtol=0, atol=1e-9 * np.abs(G).max())
    loss = functional.cross_entropy(settled(ids), targets)
    assert run.model.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert torch.equal(model.table.weight, stored)


@pytest.mark.parametrize("given", ["model", "bundle"])
def test_gradients_are_those_of_the_loss(given: str, tmp_path: Path) -> None:
    """scale_grad_by_freq divides rows of the gradient: the note says that this is left out."""
    model, ids, targets = problem(scale_grad_by_freq=True)
    plain, _, _ = problem()
    found: Any = model
    if given == "bundle":
        found = tmp_path / "b.pt"
        curvscope.capture(found, model, (ids, targets), loss="cross_entropy")
    run = curvscope.analyze(found, (ids, targets), **OPTIONS)
    (note,) = (note for note in run.notes if "scale_grad_by_freq" in note)
    assert ("table" if given == "model" else "head") in note  # a graph knows a tied weight by one of its names
    true, divided = (
        torch.autograd.grad(functional.cross_entropy(each(ids), targets), each.table.weight)[0]
        for each in (plain, model)
    )
    assert not torch.allclose(true, divided)
    assert run.layers["table"].attributes["gradient_norm"] == pytest.approx(float(true.norm()), rel=1e-10)
    G = naive_block(plain, ids, targets).numpy()
    np.testing.assert_allclose(run.layers["table"].block, G, rtol=0, atol=1e-9 * np.abs(G).max())
    assert not any("scale_grad" in note for note in curvscope.analyze(plain, (ids, targets), **OPTIONS).notes)
