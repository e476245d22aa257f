"""Estimates from draws: unbiased, and inside their own error bars as often as they should."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import curvscope
from curvscope.curvature.kronecker import EigenCorrected, Kronecker
from curvscope.extract import choose
from curvscope.extract.plan import LayerPlan
from curvscope.measure import jackknife
from curvscope.measure.draws import block_pairs
from curvscope.measure.ekfac_estimate import _groups, ekfac_pairs, halves
from curvscope.measure.estimate import estimated_errors
from curvscope.measure.jackknife import sums
from curvscope.run import Run
from tests import models
from tests.measure.repeated import Repeated, block_of


def problem() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = models.Pooled(models.mlp(3, 5, 3), nn.Linear(3, 4))
    return model, (torch.randn(12, 3, 3), torch.randint(4, (12,)))


def run(fisher: str, seed: int = 0, samples: int | None = 8) -> Run:
    model, batch = problem()
    return curvscope.analyze(
        model, batch, loss="cross_entropy", dtype="float64", fisher=fisher, samples=samples, seed=seed
    )


@cache
def repeated() -> Repeated:
    model, batch = problem()
    return Repeated(model, batch, "cross_entropy")


@pytest.mark.parametrize("fisher", ["probe", "mc"])
def test_drawn_columns_are_those_of_the_sweep(fisher: str) -> None:
    """What the repetitions rest on."""
    swept, drawn = repeated().swept(repeated().root(fisher, 3, 4)), repeated().drawn(fisher, 3, 4)
    for layer, want in swept.items():
        torch.testing.assert_close(block_of(drawn[layer]).dense(), block_of(want).dense(), rtol=1e-10, atol=1e-14)
        for flavour in ("expand", "reduce"):
            torch.testing.assert_close(drawn[layer].probe_B[flavour], want.probe_B[flavour], rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(drawn[layer].factors[flavour], want.factors[flavour], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("fisher", ["probe", "mc"])
def test_factors_are_unbiased(fisher: str) -> None:
    draws = repeated().drawn(fisher, 0, 500)
    for layer, exact in repeated().exact.items():
        for flavour in ("expand", "reduce"):
            each = draws[layer].probe_B[flavour] * 500
            error = each.mean(0) - exact.factors[flavour][1]
            assert (error.abs() <= 4.5 * each.std(0) / 500**0.5 + 1e-12).all()
            torch.testing.assert_close(draws[layer].factors[flavour][0], exact.factors[flavour][0])


def test_squares_are_unbiased() -> None:
    """Pairs of different draws: ||G||^2 and ||Lambda||^2 in a fixed basis, over many repetitions."""
    exact = repeated().exact["body.0"]
    A, B = exact.factors["expand"]
    kronecker, block = Kronecker(A, B), block_of(exact)
    want = torch.tensor([block.norm**2, EigenCorrected(kronecker, block).norm ** 2])
    found = []
    for seed in range(200):
        drawn = repeated().drawn("probe", seed, 4)["body.0"]
        pairs = ekfac_pairs(block_of(drawn), kronecker.A, kronecker.B.expand(4, *B.shape), [range(4)])
        assert not pairs.doubt.any()  # the basis is exact
        found.append(sums([block_pairs(block_of(drawn))[0], pairs.settled]).whole)
    each = torch.stack(found)
    assert ((each.mean(0) - want).abs() <= 4 * each.std(0) / 200**0.5).all()


def test_ekfac_takes_basis_and_diagonal_from_different_draws() -> None:
    """In the basis of its own draws EKFAC would look better than it is."""
    drawn = repeated().drawn("probe", 0, 8)["body.0"]
    A, B = drawn.factors["expand"][0].double(), drawn.probe_B["expand"].double()
    pairs = ekfac_pairs(block_of(drawn), A, B, halves(8))
    U_A = torch.linalg.eigh(A)[1]
    V = block_of(drawn).stacked().view(-1, 8, B.shape[1], A.shape[0])

    def products(basis: list[int]) -> torch.Tensor:
        scale = 8 * (torch.linalg.eigh(B[basis].sum(0))[1].T @ V @ U_A).square().sum(0).flatten(1)  # [8, P]
        return scale @ scale.T

    for own, other in (halves(8), halves(8)[::-1]):
        whole, parts = products(other), (products(other[:2]) + products(other[2:])) / 2
        inside = torch.tensor(own)[:, None], torch.tensor(own)
        # in bases of 2, 4 and (carried on along 1/k) any number of draws
        torch.testing.assert_close(pairs.given[inside], whole[inside], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pairs.settled[inside], (2 * whole - parts)[inside], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pairs.doubt[inside], 2 * (whole - parts)[inside], rtol=1e-8, atol=1e-12)
        assert not pairs.settled[own][:, other].any()

        def different(table: torch.Tensor) -> torch.Tensor:
            return (table.sum() - table.diagonal().sum()) / 12

        # each draw of the basis left out of it, as a change of both halves' mean
        left = torch.stack([different(products([j for j in other if j != i])[inside]) for i in other])
        torch.testing.assert_close(pairs.moved[other], (left - left.mean()) / 2, rtol=1e-8, atol=1e-12)


def test_what_the_basis_owes_to_its_draws_is_in_the_bar() -> None:
    """Of a linear change the jackknife makes the variance of its mean; large bases are left out in groups."""
    torch.manual_seed(0)
    plain = sums([], [torch.zeros(8, dtype=torch.float64)])
    changes = torch.tensor([[1.0], [-1.0]] * 4, dtype=torch.float64)  # no skewness, which would widen the bar
    found = plain.moved(changes).of(lambda u: 1 + u[..., 0])
    assert found.value == pytest.approx(1.0)
    assert found.stderr == pytest.approx(float((7 / 8 * changes.square().sum()).sqrt()))
    assert _groups(range(8)) == [[i] for i in range(8)]
    assert [len(group) for group in _groups(range(16))] == [2] * 8


def test_bars_of_ekfac_allow_for_its_basis() -> None:
    """A wide layer and few draws: the basis of 4 is far from that of all, and the error bar says so."""
    torch.manual_seed(0)
    source = Repeated(models.mlp(4, 24, 12), (torch.randn(12, 4), torch.randint(12, (12,))), "cross_entropy")
    (drawn, exact) = (source.drawn("probe", 0, 8)["2"], source.exact["2"])
    block = block_of(exact)
    want = (1 - (EigenCorrected(Kronecker(*exact.factors["expand"]), block).norm / block.norm) ** 2) ** 0.5
    row = estimated_errors("2", "probe", drawn, [block_of(drawn)]).rows["ekfac_expand"]
    assert abs(row.rel_frobenius - want) <= 2.365 * row.rel_frobenius_stderr
    mine = ekfac_pairs(block_of(drawn), drawn.factors["expand"][0], drawn.probe_B["expand"] * 8, halves(8))
    of_draws = sums([block_pairs(block_of(drawn))[0], mine.settled], folds=halves(8)).of(
        lambda u: 1 - u[..., 1] / u[..., 0]
    )
    assert 2 * row.rel_frobenius * row.rel_frobenius_stderr > 1.1 * of_draws.stderr


def test_jackknife_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    pairs = X @ X.T

    def number(keep: list[int]) -> float:
        part = pairs[keep][:, keep]
        m = len(keep)
        squared = float(part.sum() - part.diagonal().sum()) / (m * (m - 1))
        return squared / float(pairs.diagonal()[keep].mean())

    def spread(keep: list[int]) -> float:
        """The jackknife's variance from some of the draws."""
        each = np.array([number([j for j in keep if j != i]) for i in keep])
        return (len(keep) - 1) / len(keep) * float(((each - each.mean()) ** 2).sum())

    whole = list(range(6))
    found = sums([pairs], [pairs.diagonal()]).of(lambda u: u[..., 0] / u[..., 1])
    each = np.array([number([j for j in whole if j != i]) for i in whole])
    assert found.value == pytest.approx(6 * number(whole) - 5 * each.mean(), rel=1e-12)
    variance = spread(whole)
    second = [
        6 * number(whole) - 5 * (each[i] + each[k]) + 4 * number([j for j in whole if j not in (i, k)])
        for i in whole
        for k in whole
        if i != k
    ]
    a, b, c = 1 / 5, 1 / 4, 1 / 3
    weight = 4 * ((c - 2 * b * c + 2 * a * b * c) ** 2 + 8 * (b * c * (2 * a - 1)) ** 2 + 6 * (2 * a * b * c) ** 2)
    once = max(variance - 2 / 20 * float(np.mean(np.square(second))) / weight, variance * 4 / 10)
    spreads = np.array([spread([j for j in whole if j != i]) for i in whole])
    change = each - each.mean()
    slope = float((change * (spreads - spreads.mean())).sum() / (change**2).sum()) / (2 * variance**0.5)
    widened = min(0.5, (1 - 3 / 6) * 2.571 * abs(slope))
    assert found.stderr == pytest.approx(once**0.5 / (1 - widened), rel=1e-10)


def test_variance_is_that_of_linear_and_of_quadratic_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean has the variance of means; a sum of products of centred draws, of second order alone, 2/(K (K - 1))."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(jackknife, "MOST_WIDENED", 0.0)
    of_mean, of_square = [], []
    for _ in range(2000):
        X = torch.randn(8, 40, generator=generator, dtype=torch.float64)
        found = sums([X @ X.T], [X[:, 0]])
        of_mean.append(found.of(lambda u: u[..., 1]).stderr ** 2)
        of_square.append(found.of(lambda u: u[..., 0]).stderr ** 2)
    assert 0.94 <= np.mean(of_mean) / (1 / 8) <= 1.06
    # the plain jackknife's would be 2.33
    assert 0.94 <= np.mean(of_square) / (2 * 40 / (8 * 7)) <= 1.5


def test_constant_draws_are_as_exact_as_their_rounding() -> None:
    found = sums([], [torch.full((8,), 3.0, dtype=torch.float64)], rounding=1e-7).of(lambda u: u[..., 0])
    assert (found.value, found.stderr) == (3.0, pytest.approx(3e-7))


def test_no_number_without_an_error_bar() -> None:
    """Eight examples, so few that the squared error without a draw is often negative: 40 seeds."""
    torch.manual_seed(0)
    source = Repeated(models.mlp(4, 3, 3), (torch.randn(8, 4), torch.randint(3, (8,))), "cross_entropy")
    withheld = 0
    for seed in range(40):
        for layer, drawn in source.drawn("mc", seed, 4).items():
            for row in estimated_errors(layer, "mc", drawn, [block_of(drawn)]).rows.values():
                for quantity in ("rel_frobenius", "cosine", "trace_ratio"):
                    value, stderr = getattr(row, quantity), getattr(row, f"{quantity}_stderr")
                    assert math.isnan(value) == math.isnan(stderr)
                    if math.isnan(value):
                        assert row.status == "not_assessed"
                        assert row.reason
                        withheld += "indistinguishable from 0" in row.reason
    assert withheld > 5


def test_what_cannot_be_estimated_is_not() -> None:
    for layer in run("probe").layers.values():
        assert layer.errors["kron_best"].status == "not_assessed"
        assert "biased" in layer.errors["kron_best"].reason
        for name in ("kfac_expand", "ekfac_expand", "ekfac_reduce", "diag"):
            assert layer.errors[name].rel_frobenius_stderr > 0 or math.isnan(layer.errors[name].rel_frobenius)
        assert "eigenbasis is carried on from 2 and 4 draws" in layer.errors["ekfac_expand"].reason
        assert layer.spectra["ggn"].status == "estimated"
        assert math.isnan(layer.spectra["ggn"].lambda_max)
        for name in ("ggn", "kfac_expand", "kfac_reduce"):
            assert layer.spectra[name].trace_stderr > 0
            assert "biased" in layer.spectra[name].reason


def test_ekfac_needs_more_draws_than_the_others() -> None:
    for layer in run("probe", samples=4).layers.values():
        assert layer.errors["kfac_expand"].rel_frobenius_stderr > 0 or layer.errors["kfac_expand"].reason
        assert layer.errors["ekfac_expand"].status == "not_assessed"
        assert "--samples 8" in layer.errors["ekfac_expand"].reason


def test_eight_draws_are_the_default() -> None:
    for fisher in ("probe", "mc"):
        assert run(fisher, samples=None).info.samples == 8


def test_too_few_draws_give_no_number() -> None:
    for layer in run("mc", samples=1).layers.values():
        assert {row.status for row in layer.errors.values()} == {"not_assessed"}
        assert layer.factors["expand"].B.any()


def test_seeds_decide_the_draws() -> None:
    first, again, other = run("mc", 1), run("mc", 1), run("mc", 2)
    B = [each.layers["head"].factors["expand"].B for each in (first, again, other)]
    np.testing.assert_array_equal(B[0], B[1])
    assert not np.array_equal(B[0], B[2])


def test_empirical_is_another_matrix() -> None:
    """At the true labels: sum over examples of N times the outer product of their own gradients, mean loss."""
    model, (inputs, targets) = problem()
    model = model.double()
    inputs = inputs.double()
    got = curvscope.analyze(
        model, (inputs, targets), loss="cross_entropy", dtype="float64", fisher="empirical", dump=("blocks",)
    )
    block = torch.zeros_like(torch.as_tensor(got.layers["head"].block))
    count = len(targets)
    for n in range(count):
        loss = nn.functional.cross_entropy(model(inputs[n : n + 1]), targets[n : n + 1])
        weight, bias = torch.autograd.grad(loss, [model.head.weight, model.head.bias])
        column = torch.cat([weight, bias.unsqueeze(1)], 1).flatten()
        block += torch.outer(column, column) / count
    np.testing.assert_allclose(got.layers["head"].block, block.numpy(), rtol=1e-10, atol=1e-14)
    assert {row.fisher for row in got.layers["head"].errors.values()} == {"empirical"}
    assert math.isnan(got.layers["head"].errors["kfac_expand"].rel_frobenius_stderr)


def test_auto_takes_probes_where_time_or_size_forbid_exact_columns() -> None:
    model, batch = problem()
    assert curvscope.analyze(model, batch, loss="cross_entropy").info.fisher == "exact"
    hurried = curvscope.analyze(model, batch, loss="cross_entropy", time=1e-9)
    assert hurried.info.fisher == "probe"
    assert hurried.info.samples == 8
    assert any("--time" in note for note in hurried.notes)


def limited(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """A lower bound on min(P, N K)."""
    original = choose.plan_layer

    def with_limit(*args: Any, **options: Any) -> LayerPlan:
        return original(*args, **options | {"limit": limit})

    monkeypatch.setattr(choose, "plan_layer", with_limit)


def test_auto_estimates_only_the_layers_that_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = models.mlp(3, 8, 13), (torch.randn(12, 3), torch.randint(13, (12,)))
    exact = curvscope.analyze(model, batch, loss="cross_entropy", dtype="float64", fisher="exact")
    limited(monkeypatch, 100)
    run = curvscope.analyze(model, batch, loss="cross_entropy", dtype="float64", seed=2)
    assert (run.info.fisher, run.info.samples) == ("exact", 8)
    assert list(run.layers) == list(exact.layers)
    note = "1 layer gets 8 probes in place of exact columns: 2 (min(P, N K) = 117 exceeds 100)."
    assert note in run.notes
    for name, row in exact.layers["0"].errors.items():
        assert run.layers["0"].errors[name].fisher == "exact"
        assert run.layers["0"].errors[name].rel_frobenius == pytest.approx(row.rel_frobenius, rel=1e-9)
    got, want = run.layers["2"], exact.layers["2"]
    for flavour in ("expand", "reduce"):
        np.testing.assert_allclose(got.factors[flavour].B, want.factors[flavour].B)  # of all columns, not of draws
        mine, other = got.spectra[f"kfac_{flavour}"], want.spectra[f"kfac_{flavour}"]
        assert (mine.status, mine.condition) == ("ok", pytest.approx(other.condition, rel=1e-6))
    for name in ("kfac_expand", "ekfac_expand", "ekfac_reduce", "diag"):
        row = got.errors[name]
        assert (row.fisher, row.status) == ("probe", "estimated")
        for key in ("rel_frobenius", "cosine"):
            gap = abs(getattr(row, key) - getattr(want.errors[name], key))
            assert 0 < gap <= 4 * getattr(row, f"{key}_stderr")
    assert "eigenbasis of the exact factors" in got.errors["ekfac_expand"].reason
    assert got.errors["kron_best"].status == "not_assessed"
    assert abs(got.spectra["ggn"].trace - want.spectra["ggn"].trace) <= 4 * got.spectra["ggn"].trace_stderr
    assert run.model.gradient_norm == pytest.approx(exact.model.gradient_norm, rel=1e-12)


def test_auto_takes_probes_for_all_where_no_layer_is_small_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = models.mlp(3, 8, 13), (torch.randn(12, 3), torch.randint(13, (12,)))
    limited(monkeypatch, 20)
    run = curvscope.analyze(model, batch, loss="cross_entropy")
    assert run.info.fisher == "probe"
    assert any("layer 0: min(P, N K) = 32 exceeds 20. 8 probes instead" in note for note in run.notes)


def test_auto_estimates_the_layers_that_would_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = models.mlp(3, 8, 13), (torch.randn(12, 3), torch.randint(13, (12,)))
    monkeypatch.setattr(choose, "measure_seconds", lambda load, rates: 1e9 if load.spec.name == "2" else 0.0)
    run = curvscope.analyze(model, batch, loss="cross_entropy")
    assert run.info.fisher == "exact"
    assert any("1 layer gets 8 probes" in note and "2 (measuring its 12 columns" in note for note in run.notes)
