"""Scales of inputs, weights and outputs on real models, and the shape of the graph they are read from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.graph.entry import shape_of
from curvscope.records import StabilityRow
from tests import models
from tests.networks import graph_and_network


def rows(run: Any, quantity: str) -> dict[str, StabilityRow]:
    return {row.layer: row for row in run.tables["stability"] if row.quantity == quantity}


def analyze(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Any:
    return curvscope.analyze(model, (x, y), loss="cross_entropy", **options)


class Recurrent(nn.Module):
    """A tanh RNN whose last state is read out."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.RNN(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class NormFirst(nn.Module):
    """A norm takes the inputs in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body, self.head = nn.LayerNorm(4), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.norm(x))))


@pytest.mark.parametrize(
    ("build", "inputs", "first", "last", "norms"),
    [
        (lambda: models.mlp(4, 5, 3), (6, 4), ("0",), ("2",), 0),
        (NormFirst, (6, 4), (), ("head",), 1),
        (Recurrent, (6, 5, 3), ("rnn.weight_ih_l0",), ("head",), 0),
    ],
)
def test_where_inputs_come_in_and_outputs_leave(
    build: Any, inputs: tuple[int, ...], first: tuple[str, ...], last: tuple[str, ...], norms: int
) -> None:
    graph, _ = graph_and_network(build().double(), torch.randn(inputs), torch.randint(3, (6,)), "cross_entropy")
    shape = shape_of(graph)
    assert shape is not None
    assert (shape.first, shape.last, shape.norms) == (first, last, norms)


@pytest.mark.parametrize(("scale", "told"), [(1.0, False), (30.0, True)])
def test_inputs_out_of_scale(scale: float, told: bool) -> None:
    torch.manual_seed(0)
    x, y = scale * torch.randn(16, 4), torch.randint(3, (16,))
    run = analyze(models.mlp(4, 5, 3), x, y)
    assert rows(run, "input_scale")["0"].value == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)
    assert ("CS213" in {row.code for row in run.findings}) == told
    assert not rows(analyze(NormFirst(), x, y), "input_scale")


@pytest.mark.parametrize(("factor", "told"), [(5.0, False), (40.0, True)])
def test_one_example_out_of_scale(factor: float, told: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4).sign()
    x[3] *= factor
    run = analyze(models.mlp(4, 5, 3, activation=nn.ReLU), x, torch.randint(3, (16,)))
    row = rows(run, "odd_example")[""]
    assert (row.value, row.reason) == (pytest.approx(factor), "example 3")
    found = {one.code: one for one in run.findings}
    assert ("CS214" in found) == told
    if told:
        assert found["CS213"].caused_by == "CS214"


@pytest.mark.parametrize(("factor", "told"), [(1.0, False), (8.0, True)])
def test_a_layer_of_another_scale(factor: float, told: bool) -> None:
    torch.manual_seed(0)
    model = models.mlp(4, 16, 16, 16, 3)
    with torch.no_grad():
        model[2].weight *= factor
    run = analyze(model, torch.randn(16, 4), torch.randint(3, (16,)))
    expected = float(model[2].weight.detach().square().sum(1).mean().sqrt())
    assert rows(run, "weight_scale")["2"].value == pytest.approx(expected, rel=1e-5)
    assert [row.layer for row in run.findings if row.code == "CS211"] == (["2"] if told else [])


class Tokens(nn.Module):
    """A table of tokens and a head, which may be the table itself."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 4), nn.Linear(4, 50, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x)).mean(1))


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_is_as_large_as_what_it_puts_out(tied: bool) -> None:
    """torch draws its entries from N(0, 1): fine as inputs of the next layer, far too large as rows of a head."""
    torch.manual_seed(0)
    model = Tokens(tied)
    run = analyze(model, torch.randint(50, (8, 3)), torch.randint(50, (8,)))
    weight = model.table.weight.detach()
    expected = weight.square().sum(1).mean().sqrt() if tied else weight.square().mean().sqrt()
    assert rows(run, "weight_scale")["table"].value == pytest.approx(float(expected), rel=1e-5)
    assert expected == pytest.approx(2.0 if tied else 1.0, rel=0.1)


@pytest.mark.parametrize(("radius", "severity"), [(1.9, ""), (2.1, "info"), (3.1, "warning")])
def test_a_recurrent_weight(radius: float, severity: str) -> None:
    torch.manual_seed(0)
    model = Recurrent()
    with torch.no_grad():
        weight = model.rnn.weight_hh_l0
        weight *= radius / torch.linalg.eigvals(weight).abs().max()
    run = analyze(model, torch.randn(8, 5, 3), torch.randint(3, (8,)))
    assert rows(run, "recurrent_radius")["rnn.weight_hh_l0"].value == pytest.approx(radius, rel=1e-4)
    found = {row.code: row.severity for row in run.findings}
    assert found.get("CS212", "") == severity


def test_gaps_of_the_logits_over_the_terms_that_count() -> None:
    torch.manual_seed(0)
    model, x = models.mlp(4, 5, 3), torch.randn(9, 4)
    with torch.no_grad():
        model[2].weight *= 400
        logits = model(x)
    y = logits.argmax(1)
    y[0] = (y[0] + 1) % 3
    y[1] = -100
    run = analyze(model, x, y)
    gap, wrong = rows(run, "logit_gap")["2"], rows(run, "wrong_and_certain")["2"]
    kept = logits[[0, *range(2, 9)]]
    two = kept.topk(2).values
    assert gap.value == pytest.approx(float((two[:, 0] - two[:, 1]).median()), rel=1e-4)
    assert wrong.value == pytest.approx(1 / 8 if float(kept[0].softmax(0).max()) > 0.999 else 0.0)
    assert gap.value > 24 * math.log(2)
    assert "CS210" in {row.code for row in run.findings}


def test_eager_models_are_not_assessed() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            return self.head(h) if float(x.sum()) > -1e9 else h

    run = analyze(Branching(), torch.randn(6, 4), torch.randint(3, (6,)))
    for quantity in ("input_scale", "signal_drift", "saturated_units", "normalisations"):
        assert rows(run, quantity)[""].status == "not_assessed"
        assert "eager" in rows(run, quantity)[""].reason
