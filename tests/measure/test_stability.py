"""The verdict rule, the table of a whole network, halves of the batch, and what missing state leads to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.curvature.extremes import Extremes, Pair
from curvscope.load.optimizer import as_optimizer_state
from curvscope.load.optimizer_options import optimizer_options
from curvscope.load.optimizer_settings import OptimizerSettings, optimizer_settings
from curvscope.measure.halves import halves
from curvscope.measure.network import Network
from curvscope.measure.spreads import Wanted
from curvscope.measure.stability import Spread, eigenvalue_row, verdict
from curvscope.measure.stability_stage import NO_OPTIMIZER, assess
from curvscope.records import StabilityRow
from tests import models
from tests.networks import graph_and_network


def pair(value: float, residual: float = 0.0, converged: bool = True) -> Extremes:
    return Extremes([Pair(value, torch.ones(1), residual, converged)], [], 1)


RULE = {
    "all above": ([11, 12, 10.5], 10, True, "above"),
    "one half at the threshold": ([11, 12, 10], 10, True, "undecided"),
    "one half below": ([11, 12, 9], 10, True, "undecided"),
    "all below": ([9, 9.9, 3], 10, True, "below"),
    "highest at the threshold": ([9, 10, 3], 10, True, "undecided"),
    "only the batch below": ([9, 12, 11], 10, True, "undecided"),
    "no halves": ([20], 10, False, "undecided"),
    "no threshold": ([1, 1, 1], float("nan"), True, "undecided"),
}


@pytest.mark.parametrize("name", RULE)
def test_the_verdict_rule(name: str) -> None:
    values, threshold, halved, expected = RULE[name]
    spread = Spread.of(pair(values[0]), [pair(value) for value in values[1:]])
    assert verdict(spread, threshold, halved=halved) == expected


def test_what_did_not_converge_can_be_above_and_never_below() -> None:
    low = Spread.of(pair(9, 5, converged=False), [pair(8), pair(8)])
    assert verdict(low, 100, halved=True) == "undecided"
    assert verdict(low, 7, halved=True) == "above"
    wide = Spread.of(pair(9, 0.9), [pair(8), pair(9.5, 0.6)])
    assert verdict(wide, 10.0, halved=True) == "undecided"
    assert verdict(wide, 10.2, halved=True) == "below"


def test_a_part_of_what_moves_is_never_below() -> None:
    spread = Spread.of(pair(9), [pair(8), pair(9)])
    assert verdict(spread, 10, halved=True, joint=False) == "undecided"
    assert verdict(spread, 7, halved=True, joint=False) == "above"


def problem(loss: Any = "cross_entropy", examples: int = 12) -> tuple[nn.Module, Network]:
    torch.manual_seed(0)
    model = models.mlp(4, 6, 5, 3).double()
    x, y = torch.randn(examples, 4).double(), torch.randint(3, (examples,))
    return model, graph_and_network(model, x, y, loss)[1]


def data(network: Network) -> tuple[Tensor, Tensor]:
    (piece,) = network.pieces()
    return piece.tensors[0], piece.targets


def rows_of(network: Network, settings: OptimizerSettings | None, **wanted: Any) -> list[StabilityRow]:
    return assess(network, settings, network.graph.layers, {}, Wanted(**{"tolerance": 1e-9, **wanted}))


def settings_of(network: Network, words: str) -> OptimizerSettings:
    shapes = {name: p.shape for name, p in network.parameters.items()}
    found = optimizer_settings(None, shapes, optimizer_options(words))
    assert found is not None
    return found


def dense_top(model: nn.Module, x: Tensor, y: Tensor, reduction: str = "mean") -> float:
    names = list(dict(model.named_parameters()))
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([p.numel() for p in model.parameters()])
        given = {n: q.view_as(p) for n, q, p in zip(names, parts, model.parameters(), strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, given, (x,)), y, reduction=reduction)

    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))[-1])


@pytest.mark.parametrize("loss", ["cross_entropy", "cross_entropy:reduction=sum"])
@pytest.mark.parametrize("examples", [12, 9])
def test_halves_are_the_network_on_those_examples(loss: str, examples: int) -> None:
    model, network = problem(loss, examples)
    parts = halves(network, seed=3)
    assert not isinstance(parts, str)
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(3))
    for half, index in zip(parts, (order[: examples // 2], order[examples // 2 :]), strict=True):
        assert half.examples == len(index)
        assert half.scale == (examples / len(index) if loss.endswith("sum") else 1.0)
        x, y = (part[index] for part in data(network))
        assert torch.equal(data(half.network)[0], x)
        reduction = "sum" if loss.endswith("sum") else "mean"
        want = float(nn.functional.cross_entropy(model(x), y, reduction=reduction).detach())
        assert half.network.loss() == pytest.approx(want, rel=1e-12)


class Fixed(nn.Module):
    """A batch size that the graph has built in."""

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.net, self.examples = models.mlp(4, 5, 3), examples

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.reshape(self.examples, 4))


def test_a_fixed_batch_size_takes_every_example_twice() -> None:
    torch.manual_seed(0)
    model = Fixed(8).double()
    x, y = torch.randn(8, 4).double(), torch.randint(3, (8,))
    _, network = graph_and_network(model, x, y, "cross_entropy")
    parts = halves(network, seed=0)
    assert not isinstance(parts, str)
    for half in parts:
        inputs, _ = data(half.network)
        assert (inputs.shape[0], half.examples) == (8, 4)
        assert torch.equal(inputs[:4], inputs[4:])


def test_what_can_not_be_halved_says_so() -> None:
    _, network = problem(examples=3)
    assert halves(network, seed=0) == "a batch of 3 can't be halved"
    _, network = problem(lambda f, y: f.square().sum().sqrt())
    assert "neither a mean nor a sum" in halves(network, seed=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_rows_are_the_dense_numbers(reduction: str) -> None:
    model, network = problem(f"cross_entropy:reduction={reduction}")
    x, y = data(network)
    top = dense_top(model, x, y, reduction)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    # a sum's halves stand for twice as many examples
    scale = 2.0 if reduction == "sum" else 1.0
    tops = [scale * dense_top(model, x[index], y[index], reduction) for index in (order[:6], order[6:])]
    found = rows_of(network, settings_of(network, "sgd:lr=0.1"))
    rows = {row.quantity: row for row in found if row.scope == "network"}
    assert rows["hessian_top"].value == pytest.approx(top, rel=1e-8)
    sharpness = rows["preconditioned_sharpness"]
    assert (sharpness.value, sharpness.low, sharpness.high) == pytest.approx(
        (top, min(top, *tops), max(top, *tops)), rel=1e-8
    )
    assert sharpness.threshold == pytest.approx(20.0, rel=1e-14)
    assert rows["growth_factor"].value == pytest.approx(abs(1 - 0.1 * top), rel=1e-8)
    assert rows["largest_stable_lr"].value == pytest.approx(2 / top, rel=1e-8)
    shares = [row.value for row in found if row.quantity == "direction_share"]
    assert sum(shares) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize(("times", "expected"), [(0.2, "below"), (5.0, "above"), (0.97, "undecided")])
def test_verdicts_follow_the_rate(times: float, expected: str) -> None:
    model, network = problem()
    top = dense_top(model, *data(network))
    found = rows_of(network, settings_of(network, f"sgd:lr={times * 2 / top},momentum=0"))
    said = {row.quantity: row.verdict for row in found if row.scope == "network"}
    assert said["preconditioned_sharpness"] == said["growth_factor"] == said["largest_stable_lr"] == expected
    blocks = [row for row in found if row.scope == "layer" and row.quantity == "preconditioned_sharpness"]
    for row in blocks:
        if row.verdict == "below":
            assert "says nothing of the whole" in row.reason
    if expected == "above":
        assert all(row.status == "ok" for row in blocks)


def test_l2_decay_is_added_once_also_to_a_sums_halves() -> None:
    _, network = problem("cross_entropy:reduction=sum")
    plain = rows_of(network, settings_of(network, "sgd:lr=0.01"))
    decayed = rows_of(network, settings_of(network, "sgd:lr=0.01,weight_decay=0.7"))
    for before, after in zip(plain, decayed, strict=True):
        if before.scope == "network" and before.quantity == "preconditioned_sharpness":
            for column in ("value", "low", "high"):
                assert getattr(after, column) == pytest.approx(getattr(before, column) + 0.7, rel=1e-9)


def test_an_eigenvalue_that_is_weight_decay_says_so() -> None:
    """Dead weights under Adam: P is as small as the decay, wd / P far over any curvature, on every part the same."""
    model, batch = problem()
    shapes = {name: p.shape for name, p in batch.parameters.items()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, weight_decay=1e-2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    plain = optimizer_settings(as_optimizer_state(optimizer, model), shapes)
    assert not [row for row in rows_of(batch, plain, full=True) if "weight decay" in row.reason]
    optimizer.param_groups[0]["weight_decay"] = 5.0
    optimizer.state[model[0].weight]["exp_avg_sq"][0] = 1e-12
    dead = optimizer_settings(as_optimizer_state(optimizer, model), shapes)
    told = {row.scope: row for row in rows_of(batch, dead) if "is weight decay over P" in row.reason}
    assert set(told) == {"network", "layer"}
    assert told["layer"].layer == "0"
    share = float(told["layer"].reason.partition("%")[0]) / 100
    root = (1 - 0.9) * ((1e-12 / (1 - 0.999)) ** 0.5 + 1e-8)
    assert share == pytest.approx(5.0 / root / told["layer"].value, abs=0.006)


def test_without_an_optimizer_sharpness_is_there_and_no_verdict() -> None:
    _, network = problem()
    rows = {row.quantity: row for row in rows_of(network, None, full=True) if row.scope == "network"}
    assert rows["hessian_top"].low <= rows["hessian_top"].value <= rows["hessian_top"].high
    governs = rows["preconditioned_sharpness"]
    assert (governs.verdict, governs.status, governs.reason) == ("not_assessed", "not_assessed", NO_OPTIMIZER)
    assert "growth_factor" not in rows
    assert {row.scope for row in rows_of(network, None)} == {"network"}


def test_missing_moments_are_not_assessed() -> None:
    model, network = problem()
    shapes = {name: p.shape for name, p in network.parameters.items()}
    fresh = torch.optim.AdamW(model.parameters())
    settings = optimizer_settings(as_optimizer_state(fresh, model), shapes)
    governs = next(row for row in rows_of(network, settings) if row.quantity == "preconditioned_sharpness")
    assert (governs.verdict, governs.status) == ("not_assessed", "not_assessed")
    assert "no exp_avg_sq" in governs.reason


def test_frozen_parameters_have_no_part() -> None:
    model, network = problem()
    shapes = {name: p.shape for name, p in network.parameters.items()}
    part = torch.optim.SGD(model[0].parameters(), lr=0.1)
    found = rows_of(network, optimizer_settings(as_optimizer_state(part, model), shapes))
    shares = {row.layer: row.value for row in found if row.quantity == "direction_share"}
    assert shares["0"] == pytest.approx(1.0)
    assert sum(shares.values()) == pytest.approx(1.0)
    governs = next(row for row in found if row.quantity == "preconditioned_sharpness" and row.scope == "network")
    block = next(row for row in found if row.quantity == "preconditioned_sharpness" and row.layer == "0")
    assert governs.value == pytest.approx(block.value, rel=1e-9)


def test_spent_time_is_told() -> None:
    _, network = problem()
    found = rows_of(network, settings_of(network, "sgd:lr=10"), seconds=0.0)
    governs = next(row for row in found if row.quantity == "preconditioned_sharpness")
    assert governs.status == "not_converged"
    assert "time" in governs.reason
    assert governs.verdict in ("above", "undecided")
    assert all(row.status in ("ok", "skipped", "not_converged", "not_assessed") for row in found)


class Kinked(nn.Module):
    """A norm at 0: its first derivative is 0, its second is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return y + (y - y.detach()).abs().pow(1.5)


def test_a_curvature_that_is_not_finite_is_told_and_the_rest_goes_on() -> None:
    torch.manual_seed(0)
    run = curvscope.analyze(
        Kinked(), (torch.randn(8, 4), torch.randint(3, (8,))), loss="cross_entropy", optimizer="sgd:lr=0.1"
    )
    row = run.tables["stability"][0]
    assert (row.quantity, row.status) == ("preconditioned_sharpness", "not_assessed")
    assert "NaN or infinite" in row.reason
    assert "CS503" in {finding.code for finding in run.findings}
    assert run.layers["net"].factors


def test_a_memory_bound_is_kept_and_told() -> None:
    _, network = problem()
    (row,) = rows_of(network, settings_of(network, "sgd:lr=0.1"), memory_bytes=1000)
    assert (row.quantity, row.verdict) == ("preconditioned_sharpness", "not_assessed")
    assert "over --memory" in row.reason


def test_through_the_pipeline_with_groups() -> None:
    torch.manual_seed(0)
    model = models.mlp(4, 6, 3)
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 30.0}], lr=0.3
    )
    run = curvscope.analyze(
        model, (torch.randn(16, 4), torch.randint(3, (16,))), loss="cross_entropy", optimizer=optimizer
    )
    assert run.model.learning_rate == 30.0
    assert run.model.optimizer == "SGD, lr 0.3 to 30 (2 values)"
    cause, first = run.findings[:2]
    assert (cause.code, cause.layer, cause.severity) == ("CS504", "2", "error")
    assert (first.code, first.layer, first.rank, first.severity) == ("CS501", "2", 2, "error")
    assert first.caused_by == "CS504 2"
    assert "2 carries" in first.evidence
    assert [row.rank for row in run.findings] == list(range(1, len(run.findings) + 1))


def test_halves_that_did_not_converge_are_no_spread() -> None:
    def ends(value: float, *, converged: bool) -> Extremes:
        return Extremes([Pair(value, torch.ones(1), 0.0, converged)], [], 1)

    known = Spread.of(ends(3.0, converged=True), [ends(2.0, converged=True), ends(4.0, converged=True)])
    assert known.bounds == (2.0, 4.0)
    cut = Spread.of(ends(3.0, converged=True), [ends(0.001, converged=False), ends(4.0, converged=True)])
    row = eigenvalue_row("network", "", "hessian_top", cut)
    assert math.isnan(row.low)
    assert math.isnan(row.high)
    assert row.status == "ok"
    assert "did not converge" in row.reason
    assert verdict(cut, 5.0, halved=True) == "undecided"


def test_a_growth_beyond_float64_is_said_in_words() -> None:
    torch.manual_seed(0)
    run = curvscope.analyze(
        nn.Sequential(nn.Linear(3, 2)),
        (torch.randn(8, 3), torch.randn(8, 2)),
        loss="mse",
        optimizer="sgd:lr=1e200,weight_decay=1e200",
    )
    rows = {row.quantity: row for row in run.tables["stability"] if row.scope == "network"}
    assert math.isinf(rows["growth_factor"].value)
    assert rows["growth_factor"].reason == "beyond what a float64 can say"
    assert rows["preconditioned_sharpness"].verdict == "above"
