"""Noise, outlier examples, means and sources of a layer against naive float64 autograd, whatever its columns' form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.measure.layer_signs import noise_rows
from curvscope.records import StabilityRow
from tests import models
from tests.reference import parameter_block

N = 8


class Grouped(nn.Module):
    """A grouped convolution, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(4, 4, 3, groups=2), nn.LayerNorm(5), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))


class Positionwise(nn.Module):
    """Tokens that do not mix: one backward pass serves all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.first(x))))


def classes(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(3, shape)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[], Tensor], str]] = {
    "mlp, formed": (lambda: models.mlp(4, 2, 3), (N, 4), classes(N), "cross_entropy"),
    "mlp, outer": (lambda: models.mlp(9, 8, 3), (N, 9), classes(N), "cross_entropy"),
    "attention": (models.SelfAttention, (N, 5, 4), classes(N), "cross_entropy"),
    "cnn": (models.ResidualCNN, (3, 2, 8, 8), classes(3), "cross_entropy"),
    "shared": (models.SharedTwice, (N, 4), classes(N), "cross_entropy"),
    "groups": (Grouped, (N, 4, 7), classes(N), "cross_entropy"),
    "positions apart": (Positionwise, (N, 5, 4), classes(N, 5), "cross_entropy:class_axis=last"),
    "summed loss": (lambda: models.mlp(4, 5, 3), (N, 4), classes(N), "cross_entropy:reduction=sum"),
}


@pytest.fixture(scope="module", params=CASES)
def analyzed(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor, str, Any]:
    torch.manual_seed(0)
    build, shape, make_targets, loss = CASES[request.param]
    model, inputs, targets = build().double().eval(), torch.randn(shape, dtype=torch.float64) + 0.3, make_targets()
    run = curvscope.analyze(model, (inputs, targets), loss=loss, dtype="float64", measure=["split"])
    return model, inputs, targets, loss, run


def value(model: nn.Module, inputs: Tensor, targets: Tensor, loss: str) -> Tensor:
    outputs = model(inputs)
    if "last" in loss:
        outputs = outputs.transpose(1, 2)
    return nn.functional.cross_entropy(outputs, targets, reduction="sum" if "sum" in loss else "mean")


def example_gradients(model: nn.Module, inputs: Tensor, targets: Tensor, loss: str) -> dict[str, Tensor]:
    """dL/dtheta of every example's own part of the loss, [N, size], by running it alone."""
    scale = 1.0 if "sum" in loss else 1 / inputs.shape[0]
    found: dict[str, list[Tensor]] = {}
    for n in range(inputs.shape[0]):
        part = scale * value(model, inputs[n : n + 1], targets[n : n + 1], loss)
        for (name, _), g in zip(
            model.named_parameters(), torch.autograd.grad(part, list(model.parameters())), strict=True
        ):
            found.setdefault(name, []).append(g.flatten())
    return {name: torch.stack(each) for name, each in found.items()}


def rows(run: Any, quantity: str) -> dict[str, StabilityRow]:
    return {row.layer: row for row in run.tables["stability"] if row.quantity == quantity}


def parameters_of(run: Any, layer: str) -> list[str]:
    return [row.parameter for row in run.tables["coverage"] if row.layer == layer]


def test_noise_and_signal_are_unbiased_sums_over_examples(analyzed: Any) -> None:
    model, inputs, targets, loss, run = analyzed
    each = example_gradients(model, inputs, targets, loss)
    count = inputs.shape[0]
    noise, signal = rows(run, "gradient_noise"), rows(run, "gradient_signal")
    layers: dict[str, list[str]] = {name: parameters_of(run, name) for name in run.layers}
    layers[""] = [name for names in layers.values() for name in names]
    assert len(layers) > 2
    for layer, names in layers.items():
        g = count * torch.cat([each[name] for name in names], dim=1)
        sigma = float((g - g.mean(0)).square().sum()) / (count - 1)
        assert noise[layer].value == pytest.approx(sigma, rel=1e-9)
        assert signal[layer].value == pytest.approx(float(g.mean(0).square().sum()) - sigma / count, rel=1e-8)
        if signal[layer].value > 0:
            assert noise[layer].threshold == pytest.approx(count * signal[layer].value)
        else:
            assert math.isnan(noise[layer].threshold)
            assert noise[layer].verdict == "not_assessed"


@pytest.mark.parametrize(
    ("mean", "verdict"), [(1.42, "below"), (1.41, "above"), (1.01, "above"), (0.99, "not_assessed")]
)
def test_noise_against_the_signal_of_the_batch(mean: float, verdict: str) -> None:
    """Two examples at mean +- 1: tr Sigma = 2 and |G|^2 = mean^2 - 1, equal for such a batch at mean = sqrt(2)."""
    g = torch.tensor([mean - 1.0, mean + 1.0], dtype=torch.float64)
    noise, signal = noise_rows((g / 2).square(), mean**2)
    assert (noise.value, signal.value) == (pytest.approx(2.0), pytest.approx(mean**2 - 1))
    assert noise.verdict == verdict


def test_the_expected_signal_is_the_squared_mean() -> None:
    """E[|G|^2 estimate] = |mu|^2 over draws of the examples, where the plain |g|^2 is too large by tr Sigma / N."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(4000):
        g = 0.5 + torch.randn(4, 3, generator=generator, dtype=torch.float64)
        noise, signal = noise_rows((g / 4).square().sum(1), float(g.mean(0).square().sum()))
        found.append((noise.value, signal.value))
    means = torch.tensor(found).mean(0)
    assert means[0] == pytest.approx(3.0, rel=0.05)
    assert means[1] == pytest.approx(0.75, rel=0.08)


def test_one_example_has_no_noise() -> None:
    run = curvscope.analyze(models.mlp(4, 3, 3), (torch.randn(1, 4), torch.tensor([1])), loss="cross_entropy")
    assert rows(run, "gradient_noise")["0"].status == "not_assessed"
    assert rows(run, "odd_example")[""].verdict == "not_assessed"


def test_shares_of_the_top_curvature_are_those_of_each_examples_block(analyzed: Any) -> None:
    model, inputs, targets, loss, run = analyzed
    scale = 1.0 if "sum" in loss else 1 / inputs.shape[0]
    for name in run.layers:
        listed = [row for row in run.tables["examples"] if row.layer == name]
        weight, *bias = parameters_of(run, name)
        if not listed:
            continue

        def loss_fn(outputs: Tensor, wanted: Tensor) -> Tensor:
            outputs = outputs.transpose(1, 2) if "last" in loss else outputs
            mean = nn.functional.cross_entropy(outputs, wanted, reduction="sum")
            return scale * mean / (wanted.numel() / wanted.shape[0])

        blocks = [
            parameter_block(model, inputs[n : n + 1], targets[n : n + 1], loss_fn, weight, *bias)
            for n in range(inputs.shape[0])
        ]
        u = torch.linalg.eigh(sum(blocks))[1][:, -1]
        shares = torch.stack([u @ G @ u for G in blocks])
        shares /= shares.sum()
        for row in listed:
            assert row.curvature_share == pytest.approx(float(shares[row.example]), abs=1e-4)
        told = rows(run, "example_share")[name]
        if len(shares) < 8:
            assert told.status == "not_assessed"
        else:
            assert told.value == pytest.approx(float(shares.max()), abs=1e-4)


def test_shares_of_every_error_sum_to_one(analyzed: Any) -> None:
    run = analyzed[-1]
    assessed = [row for row in run.tables["sources"] if row.status == "ok"]
    for row in assessed:
        assert row.spread + row.mean + row.cross == pytest.approx(1.0, abs=1e-8)
        error = run.layers[row.layer].errors[row.approximation].rel_frobenius
        assert row.relative == pytest.approx(error, rel=1e-7)
    skipped = {row.layer: row.reason for row in run.tables["sources"] if row.status != "ok"}
    assert all(skipped.values())
    assert assessed or "groups" in str(skipped)


def test_a_batch_of_copies_has_no_spread_to_blame() -> None:
    """All inputs alike: m is every input, and the error is left to positions that add up."""
    torch.manual_seed(0)
    model, x = models.SelfAttention().double().eval(), torch.randn(1, 5, 4, dtype=torch.float64)
    run = curvscope.analyze(
        model, (x.repeat(4, 1, 1), torch.tensor([0, 1, 2, 1])), loss="cross_entropy", dtype="float64"
    )
    for name in run.layers:
        share = rows(run, "mean_share")[name].value
        assert 0 <= share <= 1 + 1e-12
    first = models.mlp(4, 5, 3).double()
    flat = x[:, 0].repeat(4, 1)
    found = curvscope.analyze(first, (flat, torch.tensor([0, 1, 2, 1])), loss="cross_entropy", dtype="float64")
    assert rows(found, "mean_share")["0"].value == pytest.approx(1.0, abs=1e-12)
    assert rows(found, "mean_share")["0"].verdict == "above"


def test_float32_leaves_small_errors_unsplit() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 4).repeat(3, 1)
    run = curvscope.analyze(models.mlp(4, 5, 3), (x, torch.tensor([0, 1, 2])), loss="cross_entropy")
    (row, *_) = run.layers["0"].sources.values()
    assert row.status == "not_assessed"
    assert "digits" in row.reason
    assert math.isnan(row.spread)


def test_draws_have_no_split() -> None:
    run = curvscope.analyze(
        models.mlp(4, 5, 3), (torch.randn(5, 4), torch.randint(3, (5,))), loss="cross_entropy", fisher="probe"
    )
    assert {row.status for row in run.tables["sources"]} == {"not_assessed"}
    assert all("exact columns" in row.reason for row in run.tables["sources"])


def test_dead_inputs_and_outputs_are_counted() -> None:
    torch.manual_seed(0)
    model, x = models.mlp(4, 6, 3, activation=nn.ReLU), torch.randn(8, 4)
    with torch.no_grad():
        model[0].bias[:4] = -50.0
    run = curvscope.analyze(model, (x, torch.randint(3, (8,))), loss="cross_entropy")
    assert rows(run, "dead_outputs")["0"].value >= 4 / 6
    assert rows(run, "dead_inputs")["2"].value >= 4 / 6
    assert rows(run, "dead_units")["0"].value >= 4 / 6
    assert {"CS202 0", "CS204 2"} <= {f"{row.code} {row.layer}" for row in run.findings}


class Pixels(nn.Module):
    """A convolution of 2 channels and 3 x 4 output pixels, of which the head reads the first and, by `rest`, others."""

    def __init__(self, rest: float) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 2), nn.Linear(24, 3)
        with torch.no_grad():
            self.head.weight.view(3, 2, 12)[:, :, 1:] *= rest

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(1))


@pytest.mark.parametrize(("rest", "told"), [(1.0, False), (0.1, True)])
def test_the_share_of_one_pixel(rest: float, told: bool) -> None:
    """Pixel r has sum_n tr J_r^T H_n J_r of tr B, J_r the outputs' Jacobian by what the convolution puts out there."""
    torch.manual_seed(0)
    model, x = Pixels(rest).double(), torch.randn(5, 1, 4, 5, dtype=torch.float64)
    run = curvscope.analyze(model, (x, torch.randint(3, (5,))), loss="cross_entropy", dtype="float64")
    energy = torch.zeros(12, dtype=torch.float64)
    for y in model.conv(x).detach():
        f = lambda y: model.head(torch.tanh(y).flatten())  # noqa: E731
        J = torch.autograd.functional.jacobian(f, y).flatten(2)
        p = torch.softmax(f(y), 0).detach()
        energy += torch.einsum("icr,ij,jcr->r", J, torch.diag(p) - torch.outer(p, p), J)
    row = rows(run, "position_share")["conv"]
    assert row.value == pytest.approx(float((energy / energy.sum()).max()), rel=1e-9)
    assert row.reason.startswith(f"position {int(energy.argmax())} of 12")
    assert [one.layer for one in run.findings if one.code == "CS208"] == (["conv"] if told else [])
    assert "fewer than 4" in rows(run, "position_share")["head"].reason


def test_where_kfac_is_exact_nothing_limits_it() -> None:
    """One example: every error is rounding, and their ratio says nothing."""
    run = curvscope.analyze(models.mlp(4, 3, 3), (torch.randn(1, 4), torch.tensor([1])), loss="cross_entropy")
    for row in rows(run, "kronecker_limit").values():
        assert (row.status, row.verdict) == ("not_assessed", "not_assessed")
        assert "roundings" in row.reason


def test_factors_that_float32_does_not_resolve() -> None:
    """An input that is the sum of two others makes A singular; B of a softmax layer always is, by the sum of p."""
    torch.manual_seed(0)
    x = torch.randn(40, 4, dtype=torch.float64)
    for singular in (False, True):
        if singular:
            x[:, 3] = x[:, 0] + x[:, 1]
        run = curvscope.analyze(nn.Linear(4, 3).double(), (x, torch.randint(3, (40,))), loss="cross_entropy")
        share, condition = rows(run, "unresolved_A")["model"], rows(run, "condition_A")["model"]
        assert (share.value, share.verdict) == ((pytest.approx(0.2), "above") if singular else (0.0, "below"))
        assert math.isnan(condition.value) == singular
        if not singular:
            a = torch.cat([x, torch.ones(40, 1)], 1)
            assert condition.value == pytest.approx(float(torch.linalg.cond(a.T @ a)), rel=1e-3)
        assert rows(run, "unresolved_B")["model"].verdict == "above"


def test_what_a_table_of_tokens_has_not() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3))
    run = curvscope.analyze(model, (torch.randint(7, (6, 3)), torch.randint(3, (6,))), loss="cross_entropy")
    for quantity in ("mean_share", "unresolved_A", "position_share", "example_share"):
        row = rows(run, quantity)["0"]
        assert row.status == "not_assessed" or quantity == "example_share", row
        assert "pieces" not in row.reason


@pytest.mark.parametrize("examples", [1, 2, 7, 8, 9])
def test_the_largest_share_of_few_examples_is_not_assessed(examples: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
    x, y = torch.randn(examples, 3), torch.randn(examples, 2)
    x[1:] *= 1e-2  # the first carries it
    run = curvscope.analyze(model, (x, y), loss="mse", optimizer="sgd:lr=0.1")
    told = [row for row in run.tables["stability"] if row.quantity == "example_share"]
    assert len(told) == 3
    if examples < 8:
        assert {row.status for row in told} == {"not_assessed"} and math.isnan(told[0].value)
        assert all("told from 8 examples on" in row.reason for row in told)
    else:
        assert {row.status for row in told} == {"ok"} and told[0].value <= 1
    assert ("CS207" in {row.code for row in run.findings}) == (examples >= 8)
    assert [row for row in run.tables["examples"] if not row.layer]
