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
from curvscope.run import Run
from tests import models

REPETITIONS = 60
# two-sided 95 % quantile of Student's t with 7 degrees of freedom
T_7 = 2.365


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
def exact() -> Run:
    return run("exact")


@cache
def repeated(fisher: str) -> list[Run]:
    return [run(fisher, seed) for seed in range(REPETITIONS)]


@pytest.mark.parametrize("fisher", ["probe", "mc"])
@pytest.mark.parametrize("layer", ["body.0", "body.2", "head"])
def test_factors_are_unbiased(fisher: str, layer: str) -> None:
    for flavour in ("expand", "reduce"):
        want = exact().layers[layer].factors[flavour].B
        draws = np.stack([each.layers[layer].factors[flavour].B for each in repeated(fisher)])
        error = draws.mean(0) - want
        stderr = draws.std(0, ddof=1) / math.sqrt(len(draws))
        assert np.all(np.abs(error) <= 4.5 * stderr + 1e-12)
        np.testing.assert_allclose(
            exact().layers[layer].factors[flavour].A, repeated(fisher)[0].layers[layer].factors[flavour].A
        )


@pytest.mark.parametrize("fisher", ["probe", "mc"])
@pytest.mark.parametrize("approximation", ["kfac_expand", "kfac_reduce", "diag"])
def test_intervals_cover(fisher: str, approximation: str) -> None:
    """95 % intervals hold the exact number in 85 to 100 % of repetitions, over layers and quantities."""
    inside = []
    for layer in exact().layers:
        want = exact().layers[layer].errors[approximation]
        for each in repeated(fisher):
            got = each.layers[layer].errors[approximation]
            for key in ("rel_frobenius", "trace_ratio"):
                value, stderr = getattr(got, key), getattr(got, f"{key}_stderr")
                if stderr > 0 and want.rel_frobenius > 0.1:
                    inside.append(abs(value - getattr(want, key)) <= T_7 * stderr)
    assert len(inside) >= 60
    assert 0.85 <= np.mean(inside) <= 1.0


def test_what_cannot_be_estimated_is_not() -> None:
    for layer in run("probe").layers.values():
        for name in ("ekfac_expand", "ekfac_reduce", "kron_best"):
            assert layer.errors[name].status == "not_assessed"
            assert "biased" in layer.errors[name].reason
        assert layer.spectra["ggn"].status == "estimated"
        assert math.isnan(layer.spectra["ggn"].lambda_max)


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
