"""Columns in pieces: whatever the bound, the numbers are the same or said not to be assessed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import curvscope
from curvscope.extract import choose, plan
from curvscope.extract.plan import LayerPlan, plan_sweeps
from curvscope.graph.sites import LayerSpec
from tests import models


def run(memory: int | None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = models.Pooled(models.mlp(6, 8, 6), nn.Linear(6, 5))
    batch = (torch.randn(4, 9, 6), torch.randint(5, (4,)))
    return curvscope.analyze(
        model, batch, loss="cross_entropy", dtype="float64", fisher="exact", memory=memory, **options
    )


def test_groups_of_layers_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(10**9)
    monkeypatch.setattr(plan, "LEAST_PIECE_BYTES", 0)
    monkeypatch.setattr(choose, "OVERHEAD_BYTES", 0)
    monkeypatch.setattr("curvscope.extract.ready.require_memory", lambda *_, **__: None)
    sweeps: list[int] = []
    original = plan.plan_sweeps

    def spy(layers: Any, budget: int, **bytes_taken: Any) -> Any:
        result = original(layers, budget, **bytes_taken)
        # other bounds are asked for the one that would do
        if budget == memory:
            sweeps.append(len(result.groups))
        return result

    monkeypatch.setattr("curvscope.extract.choose.plan_sweeps", spy)
    # which bound takes several sweeps depends on what the passes were measured to take
    for memory in range(60_000, 96_000, 6_000):
        pieces = run(memory)
        if sweeps[-1] > 1:
            break
    assert sweeps[-1] > 1
    assert list(pieces.layers) == list(whole.layers)
    for name, layer in whole.layers.items():
        other = pieces.layers[name]
        assert other.row.status == "ok"
        for approximation, row in layer.errors.items():
            if "not unique" not in row.reason:
                assert other.errors[approximation].rel_frobenius == pytest.approx(row.rel_frobenius, rel=1e-10)
    assert pieces.model.gradient_norm == pytest.approx(whole.model.gradient_norm, rel=1e-12)


def test_small_slices_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(10**9, measure=("spectral", "kron_best"), dump=("columns",))
    monkeypatch.setattr("curvscope.measure.exact_layer.Block", _sliced_block)
    sliced = run(10**9, measure=("spectral", "kron_best"), dump=("columns",))
    for name, layer in whole.layers.items():
        for approximation, row in layer.errors.items():
            got = sliced.layers[name].errors[approximation]
            assert got.rel_frobenius == pytest.approx(row.rel_frobenius, rel=1e-9), (name, approximation)
            assert got.rel_spectral == pytest.approx(row.rel_spectral, rel=1e-6), (name, approximation)


def _sliced_block(columns: Any, d_out: int, d_in: int, piece_bytes: int) -> Any:
    from curvscope.curvature.block import Block

    return Block(columns, d_out, d_in, piece_bytes=1)


def test_a_layer_that_does_not_fit_says_so_and_keeps_its_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvscope.extract.ready.require_memory", lambda *_, **__: None)
    small = run(1000)
    for layer in small.layers.values():
        assert layer.row.status == "not_assessed"
        assert "--memory" in layer.row.reason
        assert {row.status for row in layer.errors.values()} == {"not_assessed"}
        assert all(math.isnan(row.rel_frobenius) for row in layer.errors.values())
        assert layer.factors["expand"].A.shape[0] == layer.row.d_in + 1


def test_a_group_never_exceeds_the_budget() -> None:
    layers = {str(i): LayerPlan("dense", kept, work) for i, (kept, work) in enumerate([(5, 1), (7, 9), (3, 2), (8, 1)])}
    budget = 16
    groups = plan_sweeps(layers, budget).groups
    assert [name for group in groups for name in group] == list(layers)
    for group in groups:
        kept = sum(layers[name].kept_bytes for name in group)
        work = max(layers[name].measure_bytes for name in group)
        assert kept + work <= budget


def test_dense_and_factored_columns_agree() -> None:
    """The form is a matter of cost only."""
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(32, 4))
    batch = (torch.randn(3, 2, 6, 6), torch.randint(4, (3,)))
    results = {}
    for name, forced in {"dense": "dense", "factored": "factored"}.items():
        from curvscope.extract import choose

        original = choose.plan_layer

        def forcing(*args: Any, forced: str = forced, original: Any = original, **options: Any) -> LayerPlan:
            chosen = original(*args, **options)
            return LayerPlan(forced if chosen.form in ("dense", "factored") else chosen.form, 1, 1)  # type: ignore[arg-type]

        choose.plan_layer = forcing  # type: ignore[assignment]
        try:
            results[name] = curvscope.analyze(
                conv,
                batch,
                loss="cross_entropy",
                dtype="float64",
                fisher="exact",
                measure=("spectral", "kron_best"),
                dump=("columns",),
            )
        finally:
            choose.plan_layer = original
    for name, layer in results["dense"].layers.items():
        for approximation, row in layer.errors.items():
            got = results["factored"].layers[name].errors[approximation]
            assert got.rel_frobenius == pytest.approx(row.rel_frobenius, rel=1e-9), (name, approximation)


@pytest.mark.parametrize("kind", ["linear", "grouped", "exact only"])
@pytest.mark.parametrize("draws", [True, False])
def test_what_a_layer_of_few_parameters_takes_does_not_grow_with_the_examples(kind: str, draws: bool) -> None:
    """8 draws, or columns, of 20 inputs (with the bias) and 6 outputs, passes over 32 examples; no rows so many."""
    spec = LayerSpec("a", "linear", "a.weight", "a.bias", 19, 6, None)
    if kind == "grouped":
        spec = replace(spec, groups=2)
    if kind == "exact only":
        spec = replace(spec, exact_only=True, bias=None, d_in=120, d_out=1)

    def planned(examples: int, **options: Any) -> LayerPlan:
        given = {"itemsize": 4, "draws": draws, "limit": 8192, "at_once": 32, "slices": 2**21, **options}
        return plan.plan_layer(spec, examples, 8, 3, **given)

    few, many, more = planned(5), planned(1_000_000), planned(10_000_000)
    assert few.form != "formed"
    assert many == more
    assert many.form == "formed"
    parameters = spec.groups * 8 * (spec.parameters // spec.groups) ** 2
    assert many.kept_bytes == (8 if draws else 1) * parameters
    kept = planned(1000, dump=("columns",))
    assert kept.form != "formed"  # the file is to have them
    assert planned(100_000, dump=("columns",)).reason.startswith("N K = 800000 exceeds 8192")
