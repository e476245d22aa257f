"""curvscope against the naive float64 oracle, over the whole table of cases."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import curvscope
from curvscope.load.loss import named_loss
from curvscope.run import Run
from tests import reference
from tests.cases import CASE_LAYERS, CASES, DEGENERATE, Case, expected
from tests.theorems import THEOREMS

TOLERANCE = 1e-9


def analyze(case: Case, **options: Any) -> Run:
    model, inputs, targets = case.build()
    if case.rearrange is not None:
        targets = case.rearrange(model, targets)
    return curvscope.analyze(
        model,
        (inputs, targets),
        loss=named_loss(*case.given) if isinstance(case.given, tuple) else case.given or case.loss_fn,
        dtype="float64",
        example_axes=dict(case.example_axes),
        **options,
    )


@cache
def run_of(name: str) -> Run:
    return analyze(CASES[name], fisher="exact", measure=("spectral", "kron_best"), dump=("columns", "blocks"))


@cache
def run_formed(name: str) -> Run:
    """The same without columns, so that the block is formed where that is the smaller side."""
    return analyze(CASES[name], fisher="exact", measure=("spectral", "kron_best"), dump=("spectra",))


# Cases with layers whose P is at most N K, so that G itself is formed.
FORMED = (
    "ce_mean",
    "ce_weights_sum",
    "mse_mean",
    "bce_pos_weight",
    "no_bias",
    "conv2d",
    "conv1d_small",
    "cnn_residual",
    "attention",
    "shared_twice",
    "token_outputs",
    "padded_tokens",
)
RUNS = [pytest.param(run_of, *pair, id=f"columns-{pair[0]}-{pair[1]}") for pair in CASE_LAYERS] + [
    pytest.param(run_formed, *pair, id=f"formed-{pair[0]}-{pair[1]}") for pair in CASE_LAYERS if pair[0] in FORMED
]


def blind(oracle: reference.LayerReference) -> bool:
    """Whether B of reduce is zero but for rounding: key projections under softmax attention."""
    return float(oracle.factors["reduce"][1].trace()) < 1e-20 * float(oracle.factors["expand"][1].trace())


def close(got: Any, want: Any, scale: float | None = None, tolerance: float = TOLERANCE) -> bool:
    got, want = np.asarray(got, dtype=float), np.asarray(want, dtype=float)
    assert got.shape == want.shape, (got.shape, want.shape)
    scale = float(np.abs(want).max()) if scale is None else scale
    return float(np.abs(got - want).max()) <= tolerance * max(scale, 1e-300)


@pytest.mark.parametrize("name", CASES)
def test_layers_are_found_in_forward_order(name: str) -> None:
    found = [layer.name for layer in run_of(name).layers.values() if layer.factors]
    assert found == list(CASES[name].layers)


@pytest.mark.parametrize(("name", "layer"), CASE_LAYERS)
def test_factors(name: str, layer: str) -> None:
    oracle = expected(name, layer)
    got = run_of(name).layers[layer].factors
    for flavour, (A, B) in oracle.factors.items():
        assert close(got[flavour].A, A), f"{flavour} A"
        assert close(got[flavour].B, B, float(oracle.factors["expand"][1].abs().max())), f"{flavour} B"


@pytest.mark.parametrize(("name", "layer"), CASE_LAYERS)
def test_columns_and_block(name: str, layer: str) -> None:
    oracle = expected(name, layer)
    got = run_of(name).layers[layer]
    assert got.row.parameters == oracle.G.shape[0]
    flat = got.columns().reshape(got.row.columns, -1)
    assert close(flat.T @ flat, oracle.G)
    assert got.block is not None
    assert close(got.block, oracle.G)


@pytest.mark.parametrize(("run", "name", "layer"), RUNS)
def test_errors(run: Any, name: str, layer: str) -> None:
    oracle = expected(name, layer)
    got = run(name).layers[layer].errors
    A, B = oracle.factors["expand"][0], oracle.factors["expand"][1]
    for approximation, want in oracle.errors.items():
        if approximation.endswith("_reduce") and blind(oracle):
            if approximation == "kfac_reduce":
                assert got[approximation].rel_frobenius == pytest.approx(1.0, rel=1e-12)
                assert "B is zero to rounding" in got[approximation].reason
            continue
        if approximation.startswith("ekfac"):
            A, B = oracle.factors[approximation.removeprefix("ekfac_")]
            if not reference.ekfac_is_unique(oracle.G, A, B):
                assert got[approximation].rel_frobenius <= got[approximation[1:]].rel_frobenius * (1 + 1e-9)
                continue
        row = got[approximation]
        # the nearest product is degenerate where two singular values coincide; its error is not
        keys = ("rel_frobenius",) if approximation == "kron_best" else tuple(want)
        for key in keys:
            tolerance = 1e-7 if approximation == "kron_best" else TOLERANCE
            value = getattr(row, key)
            assert value == pytest.approx(want[key], rel=tolerance, abs=1e-9), f"{approximation} {key} {row.reason}"


@pytest.mark.parametrize(("run", "name", "layer"), RUNS)
def test_spectra(run: Any, name: str, layer: str) -> None:
    oracle = expected(name, layer)
    got = run(name).layers[layer]
    size = max(oracle.G.shape[0], got.row.columns)
    for matrix in ("ggn", "kfac_expand", "kfac_reduce", "diag"):
        if matrix == "kfac_reduce" and blind(oracle):
            continue
        eigenvalues = oracle.spectrum(matrix)
        values = got.spectrum[matrix]
        assert np.all(np.diff(values) <= 0)
        assert close(values, eigenvalues[: len(values)], float(eigenvalues[0]))
        assert float(eigenvalues[len(values) :].abs().sum()) <= 1e-9 * float(eigenvalues[0])
        want = reference.spectrum_numbers(eigenvalues, size)
        for key in ("trace", "lambda_max", "stable_rank", "effective_rank"):
            assert getattr(got.spectra[matrix], key) == pytest.approx(want[key], rel=1e-8), f"{matrix} {key}"


@pytest.mark.parametrize(("name", "layer"), CASE_LAYERS)
def test_gradient_norm(name: str, layer: str) -> None:
    norm = float(expected(name, layer).gradient.norm())
    assert run_of(name).layers[layer].attributes["gradient_norm"] == pytest.approx(norm, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", CASES)
def test_whole_gradient_norm_and_loss(name: str) -> None:
    case = CASES[name]
    model, inputs, targets = case.build()
    loss = case.loss_fn(reference.call(model, inputs), targets)
    loss.backward()
    norm = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    run = run_of(name)
    assert run.model.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert run.model.gradient_norm == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize(("name", "layer"), [p for p in CASE_LAYERS if p[0] in ("conv2d", "attention", "mixer")])
def test_eigenvectors(name: str, layer: str) -> None:
    oracle = expected(name, layer)
    got = run_formed(name).layers[layer]
    U, values = got.eigenvectors["ggn"], got.spectrum["ggn"]
    assert close((U * values) @ U.T, oracle.G)
    for flavour, factors in oracle.factors.items():
        for which, factor in zip("AB", factors, strict=True):
            V = got.eigenvectors[f"{flavour}/{which}"]
            turned = V.T @ factor.numpy() @ V
            assert close(turned - np.diag(np.diag(turned)), np.zeros_like(turned), float(factor.abs().max()))


@pytest.mark.parametrize("name", THEOREMS)
def test_theorem(name: str) -> None:
    theorem = THEOREMS[name]
    run = analyze(theorem.case, fisher="exact")
    approximation = f"kfac_{theorem.flavour}"
    for layer in theorem.exact:
        assert run.layers[layer].errors[approximation].rel_frobenius <= 1e-10, layer
    for layer in theorem.off:
        assert run.layers[layer].errors[approximation].rel_frobenius > theorem.margin, layer


@pytest.mark.parametrize("name", THEOREMS)
def test_frobenius_optimality(name: str) -> None:
    """kron_best is no worse than either K-FAC, EKFAC no worse than its own K-FAC."""
    for layer in analyze(THEOREMS[name].case, fisher="exact", measure=("kron_best",)).layers.values():
        errors = {key: row.rel_frobenius for key, row in layer.errors.items()}
        for flavour in ("expand", "reduce"):
            assert errors["kron_best"] <= errors[f"kfac_{flavour}"] + 1e-7
            assert errors[f"ekfac_{flavour}"] <= errors[f"kfac_{flavour}"] + 1e-7


@pytest.mark.parametrize("name", DEGENERATE)
def test_zero_curvature_is_not_assessed(name: str) -> None:
    run = analyze(DEGENERATE[name], fisher="exact")
    rows = run.layers["0"].errors.values()
    assert {row.status for row in rows} <= {"not_assessed", "skipped"}
    assert all("zero" in row.reason for row in rows)
    assert all(np.isnan(row.rel_frobenius) for row in rows)
    assert any(finding.code == "CS201" and finding.layer == "0" for finding in run.findings)
    assert torch.isfinite(torch.tensor(run.layers["2"].errors["kfac_expand"].rel_frobenius))
