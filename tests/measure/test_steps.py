"""Damped steps of the whole network against dense block-diagonal solves in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope import pipeline
from curvscope.curvature.inverse import between
from curvscope.measure import per_layer
from curvscope.measure.begin import PROBES
from curvscope.measure.recommend import holds_from, lowest
from curvscope.measure.steps import Step, _model_length
from curvscope.measure.whole import SERIES, WholeNetwork
from curvscope.records import GlobalDampingRow
from tests import models
from tests.measure.test_network import CASES, dense
from tests.whole import places, with_network

TOLERANCE = 1e-8


class Setting:
    """One case analyzed, with its dense gradient and curvature."""

    def __init__(self, name: str, decay: float = 0.0) -> None:
        torch.manual_seed(0)
        make, inputs, targets, self.loss = CASES[name]
        self.model = make().double().eval()
        self.x, y = inputs().double(), targets()
        self.y = y.double() if y.is_floating_point() else y
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, weight_decay=decay)
        self.run, self.whole = with_network(self.model, (self.x, self.y), self.loss, optimizer=optimizer)
        self.gradient, _, self.G, self.names, self.split = dense(self.model, self.x, self.y, self.loss)
        shapes = {key: p.shape for key, p in self.model.named_parameters()}
        self.theta = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        self.places = places(self.run, shapes)
        self.decay = decay
        self.right = self.gradient + decay * self.theta

    def flat(self, vector: dict[str, Tensor]) -> Tensor:
        shapes = dict(self.model.named_parameters())
        return torch.cat([vector.get(name, torch.zeros_like(shapes[name])).flatten().detach() for name in self.names])

    def matrix(self, layer: str, approximation: str, form: str, damping: float) -> Tensor:
        """(M + damping I) of one layer, formed."""
        where = self.places[layer].flatten()
        block = self.G[where][:, where]
        factors = self.run.layers[layer].factors
        identity = torch.eye(len(where), dtype=torch.float64)
        if approximation == "ggn" or not factors:
            return block + damping * identity
        pair = factors[approximation.rpartition("_")[2]]
        A, B = torch.as_tensor(pair.A), torch.as_tensor(pair.B)
        if approximation.startswith("ekfac"):
            U = torch.kron(torch.linalg.eigh(B)[1], torch.linalg.eigh(A)[1])
            return U @ torch.diag((U.T @ block @ U).diagonal()) @ U.T + damping * identity
        if form == "factored":
            pi = float((A.trace() / len(A)) / (B.trace() / len(B))) ** 0.5
            root = damping**0.5
            return torch.kron(
                B + root / pi * torch.eye(len(B), dtype=B.dtype), A + pi * root * torch.eye(len(A), dtype=A.dtype)
            )
        return torch.kron(B, A) + damping * identity

    def step(self, approximation: str, form: str, damping: float) -> Tensor:
        found = torch.zeros_like(self.theta)
        for layer, place in self.places.items():
            where = place.flatten()
            found[where] = -torch.linalg.solve(self.matrix(layer, approximation, form, damping), self.right[where])
        return found

    def objective(self, vector: Tensor) -> float:
        call = torch.func.functional_call(self.model, self.split(vector), (self.x,))
        loss = nn.functional.cross_entropy if self.loss == "cross_entropy" else nn.functional.mse_loss
        return float(loss(call, self.y)) + 0.5 * self.decay * float(vector.square().sum())


@pytest.fixture(scope="module", params=[(name, 0.0) for name in CASES] + [("cnn", 0.3), ("mlp", 0.01)], ids=str)
def setting(request: Any) -> Setting:
    return Setting(*request.param)


@pytest.mark.parametrize(("approximation", "form"), SERIES)
def test_joint_steps_are_dense_block_diagonal_solves(setting: Setting, approximation: str, form: str) -> None:
    for damping in (setting.whole.grid[0], setting.whole.grid[3], setting.whole.grid[6]):
        want = setting.step(approximation, form, damping)
        got = setting.flat(setting.whole._joint(approximation, form, damping))
        assert float((got - want).norm()) <= TOLERANCE * float(want.norm())


@pytest.mark.parametrize(("approximation", "form"), SERIES)
def test_rows_hold_the_changes_by_the_dense_model_and_by_a_forward_pass(
    setting: Setting, approximation: str, form: str
) -> None:
    rows = [row for row in setting.run.tables["steps"] if (row.approximation, row.form) == (approximation, form)]
    assert len(rows) >= 7
    for row in rows:
        step = setting.flat(setting.whole._joint(approximation, form, row.damping))
        curved = setting.G @ step + setting.decay * step
        predicted = float(setting.right @ step + 0.5 * step @ curved)
        scale = float((setting.right @ step).abs() + 0.5 * step @ curved)
        assert row.predicted_change == pytest.approx(predicted, abs=1e-9 * scale)
        base = setting.objective(setting.theta)
        actual = setting.objective(setting.theta + step) - base
        assert row.actual_change == pytest.approx(actual, rel=1e-9, abs=1e-12 * abs(base))
        assert row.step_norm == pytest.approx(float(step.norm()), rel=1e-9)
        cosine = float(-(step @ setting.right) / (step.norm() * setting.right.norm()))
        assert math.cos(math.radians(row.angle_to_gradient_degrees)) == pytest.approx(cosine, abs=1e-9)
        if not math.isnan(row.best_step_length):
            there = setting.objective(setting.theta + row.best_step_length * step) - base
            assert row.best_length_change == pytest.approx(there, rel=1e-9, abs=1e-12 * abs(base))
            assert row.best_length_change <= row.actual_change + 1e-15


def test_rho_tends_to_one_as_damping_grows(setting: Setting) -> None:
    for approximation, form in SERIES:
        large = setting.whole.grid[-1] * 100
        step = setting.whole.objective.judged(setting.whole._joint(approximation, form, large))
        assert step.rho == pytest.approx(1.0, abs=0.05), (approximation, form)
        assert step.cosine == pytest.approx(1.0, abs=1e-2) or form == "factored"


def test_the_recommendation_is_the_lowest_of_all_that_was_judged(setting: Setting) -> None:
    for summary in setting.run.tables["global_damping"]:
        rows = [
            row
            for row in setting.run.tables["steps"]
            if (row.approximation, row.form) == (summary.approximation, summary.form)
        ]
        assert summary.change == min(row.actual_change for row in rows)
        assert {summary.damping, summary.safe_damping} <= {row.damping for row in rows}
        safe = [row for row in rows if row.damping >= summary.safe_from]
        assert all(row.rho >= 0.25 and row.predicted_change < 0 for row in safe)
        below = [row.damping for row in rows if row.damping < summary.safe_from and not math.isnan(row.rho)]
        if below:
            edge = next(row for row in rows if row.damping == max(below))
            assert edge.rho < 0.25 or edge.predicted_change >= 0
            assert summary.safe_from / edge.damping < 2
        assert summary.safe_change == min(row.actual_change for row in safe)


def test_the_mean_eigenvalue_is_near_the_trace_over_the_parameters() -> None:
    found = Setting("mlp")
    exact = float(found.G.trace()) / len(found.theta)
    mean, stderr = found.whole.mean
    assert mean == pytest.approx(exact, rel=1e-10)
    assert math.isnan(stderr)
    # of +-1 signs the variance of z^T G z is 2 (||G||^2 - sum diag^2)
    spread = (2 * float(found.G.square().sum() - found.G.diagonal().square().sum()) / 4) ** 0.5 / len(found.theta)
    assert abs(found.whole.estimate[0] - exact) <= 4 * spread


def test_steps_between_kept_ones_are_within_their_bound() -> None:
    found = Setting("mlp")
    part = next(iter(found.whole.parts))
    assert part.exact is not None
    nodes = tuple(sorted(part.exact))
    for damping in (nodes[4] * 1.4, nodes[8] * 2.7):
        step = part.step("ggn", "eigenbasis", damping)
        where = found.places[part.spec.name].flatten()
        block = found.matrix(part.spec.name, "ggn", "eigenbasis", 0.0)
        values, U = torch.linalg.eigh(block)
        want = U.T @ torch.linalg.solve(block + damping * torch.eye(len(block)), -found.right[where])
        error = between(damping, nodes)[1]
        assert error < 5e-3
        assert step is not None
        assert float((U.T @ step.flatten() - want).abs().max()) <= error * float(want.abs().max())
        assert float(values[-1]) > 0


def test_per_layer_dampings_minimise_each_layers_own_model() -> None:
    found = Setting("cnn")
    own = found.whole.own["kfac_reduce", "eigenbasis"]
    assert set(own) == {name for name, layer in found.run.layers.items() if layer.factors}
    for layer, damping in own.items():
        where = found.places[layer].flatten()
        block = found.G[where][:, where]

        def model(lam: float, layer: str = layer, where: Tensor = where, block: Tensor = block) -> float:
            step = -torch.linalg.solve(found.matrix(layer, "kfac_reduce", "eigenbasis", lam), found.right[where])
            return float(found.right[where] @ step + 0.5 * step @ block @ step)

        row = next(r for r in found.run.layers[layer].ranges if r.approximation == "kfac_reduce")
        assert damping == row.recommended
        assert model(damping) == pytest.approx(-row.decrease, rel=1e-7)
        mean = float(block.trace()) / len(where)
        assert row.decrease > 0.99 * max(-model(mean * 10.0**place) for place in np.linspace(-8, 4, 200))


def by_layer(setting: Setting, summary: GlobalDampingRow, factor: float) -> dict[str, float]:
    """The dampings of a step of all layers by their own values times a factor."""
    series = (summary.approximation, summary.form)
    others = summary.damping if math.isnan(summary.safe_damping) else summary.safe_damping
    own = {layer: damping * factor for layer, damping in setting.whole.own[series].items()}
    return dict.fromkeys(setting.places, others) | own


def dense_step(setting: Setting, summary: GlobalDampingRow, dampings: Mapping[str, float]) -> Tensor:
    """The step of all layers, each at its own damping, by dense solves."""
    found = torch.zeros_like(setting.theta)
    for layer, place in setting.places.items():
        where = place.flatten()
        matrix = setting.matrix(layer, summary.approximation, summary.form, dampings[layer])
        found[where] = -torch.linalg.solve(matrix, setting.right[where])
    return found


def test_dampings_by_layer_are_set_where_their_dense_step_lowers_the_loss_more(setting: Setting) -> None:
    base = setting.objective(setting.theta)
    for summary in setting.run.tables["global_damping"]:
        series = (summary.approximation, summary.form)
        rows = {
            row.layer: row
            for row in setting.run.tables["ranges"]
            if (row.approximation, row.form) == series and not math.isnan(row.recommended)
        }
        if not rows:
            assert summary.approximation == "ggn"
            continue
        given = by_layer(setting, summary, summary.per_layer_factor)
        change = setting.objective(setting.theta + dense_step(setting, summary, given)) - base
        # layers without factors take exact steps that are interpolated between kept ones
        assert summary.per_layer_change == pytest.approx(change, rel=1e-5)
        assert summary.per_layer_rho >= 0.25
        assert summary.per_layer_predicted < 0
        assert summary.per_layer_gain == summary.per_layer_change / summary.change - 1
        for layer, row in rows.items():
            if change < summary.change:
                assert row.joint == given[layer]
                assert "joint:" not in row.reason
            else:
                assert math.isnan(row.joint)
                assert "joint: dampings of each layer's own do no better together than one for all" in row.reason
                assert "do no better together" in summary.reason


def test_the_search_for_a_factor_ends_where_a_larger_one_only_shortens_or_does_nothing(setting: Setting) -> None:
    """The largest factor tried, and a tenth of it, by dense solves: only the first is past all that is worth trying."""
    whole = setting.whole
    for summary in setting.run.tables["global_damping"]:
        series = (summary.approximation, summary.form)
        own = whole.own.get(series, {})
        if not own or series[0].startswith("ekfac"):
            continue
        tried: list[dict[str, float]] = []

        def judged(dampings: Mapping[str, float], series: Any = series, tried: Any = tried) -> Step:
            tried.append(dict(dampings))
            return whole.objective.judged(whole._joint(*series, dampings))

        others = summary.damping if math.isnan(summary.safe_damping) else summary.safe_damping
        reference = float(setting.right @ dense_step(setting, summary, dict.fromkeys(setting.places, others)))
        chosen = per_layer.search(whole.parts, own, others, judged, whole._verdict, whole.objective.right, reference)
        assert chosen.factor == summary.per_layer_factor
        first = next(iter(own))
        factors = sorted(given[first] / own[first] for given in tried)
        assert chosen.factor <= factors[-1] * (1 + 1e-9)

        def past(factor: float, summary: Any = summary, own: Any = own, reference: float = reference) -> bool:
            """Whether there is nothing to gain beyond: gradient steps that are safe, or hardly any."""
            given = by_layer(setting, summary, factor)
            step = dense_step(setting, summary, given)
            where = torch.cat([setting.places[layer].flatten() for layer in own])
            scaled = torch.cat([given[layer] * step[setting.places[layer].flatten()] for layer in own])
            curved = setting.right @ step + 0.5 * step @ (setting.G @ step + setting.decay * step)
            change = setting.objective(setting.theta + step) - setting.objective(setting.theta)
            plain = float((scaled + setting.right[where]).norm() / setting.right[where].norm()) < 0.1
            hardly = abs(float(setting.right[where] @ step[where])) < 0.01 * abs(reference)
            return hardly or (plain and float(curved) < 0 and change / float(curved) >= 0.25)

        change = setting.objective(
            setting.theta + dense_step(setting, summary, by_layer(setting, summary, factors[-1]))
        ) - setting.objective(setting.theta)
        assert past(factors[-1]) or change > summary.per_layer_change
        assert factors[-1] < 11 or not past(factors[-1] / 10)


def test_grouped_convolutions_take_the_step_of_each_group() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)).double()
    x, y = torch.randn(3, 4, 3, 3, dtype=torch.float64), torch.randint(3, (3,))
    run, whole = with_network(model, (x, y), "cross_entropy")
    gradient, _, G, names, _ = dense(model, x, y, "cross_entropy")
    pair, lam = run.layers["0"].factors["expand"], whole.grid[2]
    place = places(run, {key: p.shape for key, p in model.named_parameters()})["0"]
    got = whole._joint("kfac_expand", "eigenbasis", lam)
    exact = whole._joint("ggn", "eigenbasis", lam)
    for group in range(2):
        where = place[3 * group : 3 * group + 3].flatten()
        M = torch.kron(torch.as_tensor(pair.B[group]), torch.as_tensor(pair.A[group]))
        for vector, matrix in ((got, M), (exact, G[where][:, where])):
            flat = torch.cat([vector[name].flatten() for name in names])
            want = -torch.linalg.solve(matrix + lam * torch.eye(len(where), dtype=torch.float64), gradient[where])
            assert float((flat[where] - want).norm()) <= TOLERANCE * float(want.norm())


def test_a_zero_gradient_has_no_steps_and_says_so() -> None:
    model = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    y = model(x).detach()
    run, _ = with_network(model, (x, y), "mse")
    for row in run.tables["steps"] + run.tables["global_damping"]:
        assert row.status == "not_assessed"
        assert "gradient is zero" in row.reason


class Keys(nn.Module):
    """Attention whose key rows have gradients that cancel over positions: reduce's B is zero there."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((torch.softmax(self.q(x) @ self.k(x).mT, -1) @ x).mean(1))


class Blind(nn.Module):
    """A layer without curvature: its outputs are multiplied with zero."""

    def __init__(self) -> None:
        super().__init__()
        self.dead, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + 0.0 * self.dead(x))


def test_a_zero_factor_leaves_the_gradient_over_the_damping() -> None:
    torch.manual_seed(0)
    model, x, y = Blind().double(), torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    run, whole = with_network(model, (x, y), "cross_entropy", optimizer=optimizer)
    for approximation, form in SERIES:
        step = whole._joint(approximation, form, whole.grid[3])
        want = -0.5 * model.dead.weight.detach() / whole.grid[3]
        assert float((step["dead.weight"] - want).norm()) <= TOLERANCE * float(want.norm())
    rows = [row for row in run.tables["steps"] if row.form == "factored"]
    assert rows
    assert all("a factor is zero" in row.reason for row in rows)


def test_blind_keys_under_reduce_are_answered_with_finite_numbers() -> None:
    torch.manual_seed(0)
    model, x, y = Keys(), torch.randn(6, 5, 4), torch.randint(3, (6,))
    run, _ = with_network(model, (x, y), "cross_entropy", dtype="float32")
    rows = [row for row in run.tables["steps"] if row.approximation == "kfac_reduce"]
    assert len(rows) >= 14
    assert all(math.isfinite(row.predicted_change) and math.isfinite(row.actual_change) for row in rows)


def test_draws_give_kfac_steps_but_no_exact_ones() -> None:
    torch.manual_seed(0)
    model, x, y = models.mlp(4, 5, 3), torch.randn(6, 4), torch.randint(3, (6,))
    run, _ = with_network(model, (x, y), "cross_entropy", fisher="probe", samples=4)
    status = {(row.approximation, row.form): (row.status, row.reason) for row in run.tables["global_damping"]}
    assert status["kfac_expand", "eigenbasis"][0] == status["kfac_reduce", "factored"][0] == "estimated"
    for name in ("ekfac_expand", "ekfac_reduce", "ggn"):
        assert status[name, "eigenbasis"][0] == "not_assessed"
        assert "draws" in status[name, "eigenbasis"][1]
    for name in ("kfac_expand", "kfac_reduce"):
        assert "factors made of draws" in status[name, "eigenbasis"][1]
        assert "no dampings by layer" in status[name, "eigenbasis"][1]


def test_steps_by_drawn_factors_are_dense_solves_with_these_factors() -> None:
    torch.manual_seed(0)
    model, x, y = models.mlp(4, 5, 3).double(), torch.randn(6, 4).double(), torch.randint(3, (6,))
    run, _ = with_network(model, (x, y), "cross_entropy", fisher="probe", samples=4)
    loss = nn.functional.cross_entropy(model(x), y)
    gradients = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )
    rows = [row for row in run.tables["steps"] if (row.approximation, row.form) == ("kfac_expand", "eigenbasis")]
    assert len(rows) >= 7
    for row in rows:
        moved = {key: p.detach().clone() for key, p in model.named_parameters()}
        for name, layer in run.layers.items():
            pair = layer.factors["expand"]
            g = torch.cat([gradients[f"{name}.weight"], gradients[f"{name}.bias"][:, None]], 1)
            M = torch.kron(torch.as_tensor(pair.B), torch.as_tensor(pair.A))
            step = torch.linalg.solve(M + row.damping * torch.eye(len(M), dtype=M.dtype), -g.flatten()).view_as(g)
            moved[f"{name}.weight"] += step[:, :-1]
            moved[f"{name}.bias"] += step[:, -1]
        after = nn.functional.cross_entropy(torch.func.functional_call(model, moved, (x,)), y)
        assert row.actual_change == pytest.approx(float((after - loss).detach()), rel=1e-7, abs=1e-12)


def test_layers_that_are_left_out_stay_where_they_are() -> None:
    torch.manual_seed(0)
    model, x, y = models.mlp(4, 5, 3).double(), torch.randn(6, 4).double(), torch.randint(3, (6,))
    names = [row.name for row in with_network(model, (x, y), "cross_entropy")[0].tables["layers"]]
    run, whole = with_network(model, (x, y), "cross_entropy", skip=names[0])
    step = whole._joint("kfac_expand", "eigenbasis", whole.grid[0])
    assert step
    assert not any(name.startswith(f"{names[0]}.") for name in step)
    rows = [row for row in run.tables["steps"] if row.approximation == "kfac_expand"]
    assert all("stay where they are" in row.reason for row in rows)


def test_decoupled_decay_is_no_part_of_the_objective_and_a_damping_of_its_own_is_marked() -> None:
    torch.manual_seed(0)
    model, x, y = models.mlp(4, 5, 3), torch.randn(6, 4), torch.randint(3, (6,))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    optimizer.param_groups[0]["damping"] = 0.03
    run, whole = with_network(model, (x, y), "cross_entropy", optimizer=optimizer)
    assert not whole.objective.rates
    for summary in run.tables["global_damping"]:
        marked = [
            row
            for row in run.tables["steps"]
            if (row.approximation, row.form, row.role) == (summary.approximation, summary.form, "current")
        ]
        assert [row.damping for row in marked] == [summary.current] == [0.03]
        assert marked[0].actual_change == summary.current_change


def test_steps_are_skipped_where_they_take_too_long_and_taken_when_asked_for() -> None:
    torch.manual_seed(0)
    model, x, y = models.mlp(4, 5, 3), torch.randn(6, 4), torch.randint(3, (6,))
    run = curvscope.analyze(model, (x, y), loss="cross_entropy", time=1e-6, fisher="exact")
    assert {row.status for row in run.tables["steps"]} == {"not_assessed"}
    assert "--measure steps" in run.tables["steps"][0].reason
    asked = curvscope.analyze(model, (x, y), loss="cross_entropy", time=1e-6, fisher="exact", measure="steps")
    assert {row.status for row in asked.tables["steps"]} == {"ok"}


def test_passes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x, y = CASES["cnn"][0](), CASES["cnn"][1]().float(), CASES["cnn"][2]()
    taken: list[int] = []
    original = pipeline.stability_stage

    def stability(problem: Any, network: Any, *arguments: Any) -> Any:
        taken.append(network.passes)
        return original(problem, network, *arguments)

    monkeypatch.setattr(pipeline, "stability_stage", stability)
    run, whole = with_network(model, (x, y), "cross_entropy", dtype="float32")
    counted = sum(row.passes for row in run.tables["global_damping"])
    # beside the series: two for loss and gradient, those of the mean eigenvalue, two for the graph of the steps
    assert counted <= taken[0] <= counted + 2 + (2 + PROBES) + 2
    assert all(0 < row.passes < 120 for row in run.tables["global_damping"])
    assert np.isfinite(whole.mean[0])


def test_the_line_search_finds_the_length_of_a_parabola() -> None:
    """A linear model under squared error: the quadratic model is exact, and holds at every length."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(7, 3).double(), torch.randn(7, 2).double()
    run, whole = with_network(model, (x, y), "mse")
    searched = [row for row in run.tables["steps"] if not math.isnan(row.best_step_length)]
    assert len(searched) >= 3
    for row in run.tables["steps"]:
        assert row.rho == pytest.approx(1.0, abs=1e-6)
    for row in searched:
        step: WholeNetwork | Any = whole.objective.judged(whole._joint(row.approximation, row.form, row.damping))
        best = -step.linear / step.quadratic
        if 1 / 8 < best < 8:
            assert row.best_step_length == pytest.approx(best, rel=0.1)
        assert row.model_length == 16.0
        assert "holds up to the longest step" in row.reason


def test_the_model_stops_where_the_change_is_off_by_a_quarter_of_what_it_predicted() -> None:
    """Actual change: the model's plus length^3 / 16, the model having its lowest point, -1/2, at 1."""
    step = Step({}, -1.0, 1.0, 0.0, 1.0, 1.0)
    lengths = [2.0 ** (power / 8) for power in range(-32, 33)]
    found = {length: step.at(length) + length**3 / 16 for length in lengths}
    length, holds = _model_length(step, found, 1e-12)
    assert not holds
    # beyond 1 the largest predicted decrease stays 1/2: t^3 / 16 = 1/8
    assert length == pytest.approx(2 ** (1 / 3), rel=0.01)
    assert _model_length(step, {t: step.at(t) for t in lengths}, 1e-12) == (max(lengths), True)
    assert _model_length(step, found, 1.0)[0] > length


def test_the_search_for_the_lowest_goes_beyond_the_ends_and_between_the_points() -> None:
    grid = [10.0**k for k in range(-1, 6)]
    for place in (-2.6, 0.3, 3.14, 5.9):
        best, tried = lowest(lambda x, place=place: (math.log10(x) - place) ** 2, grid)  # type: ignore[misc]
        assert abs(math.log10(best) - place) <= 0.07
        assert len(tried) <= 21
    assert lowest(lambda x: math.nan if x < 10 else x, grid)[0] == pytest.approx(10.0)


def test_a_range_holds_from_the_last_failure_on() -> None:
    assert holds_from({1.0: True, 2.0: False, 3.0: True, 4.0: True}) == 3.0
    assert math.isnan(holds_from({1.0: True, 2.0: False}))
    assert math.isnan(holds_from({}))
