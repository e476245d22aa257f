"""What float32 can't hold is scaled, or said not to be known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import curvscope
from curvscope.run import Run
from tests import models


def saturated(gap: float, dtype: str) -> Run:
    """A classifier that is sure of itself by a logit gap: curvature of about exp(-gap)."""
    torch.manual_seed(0)
    model = models.mlp(4, 5, 3)
    with torch.no_grad():
        model.get_parameter("2.bias").copy_(torch.tensor([gap, 0.0, -1.0]))
    return curvscope.analyze(
        model,
        (torch.randn(6, 4), torch.zeros(6).long()),
        loss="cross_entropy",
        fisher="exact",
        dtype=dtype,
        dump=("blocks", "columns"),
    )


@pytest.mark.parametrize("gap", [10.0, 60.0, 170.0])
def test_tiny_curvature_is_not_taken_for_none(gap: float) -> None:
    narrow, wide = saturated(gap, "float32"), saturated(gap, "float64")
    for name, layer in wide.layers.items():
        got = narrow.layers[name]
        for approximation in ("kfac_expand", "kfac_reduce", "diag"):
            want = layer.errors[approximation].rel_frobenius
            assert got.errors[approximation].rel_frobenius == pytest.approx(want, rel=1e-3), (name, approximation)
            trace = layer.spectra[approximation].trace
            assert got.spectra[approximation].trace == pytest.approx(trace, rel=1e-3)
        assert got.spectra["ggn"].lambda_max == pytest.approx(layer.spectra["ggn"].lambda_max, rel=1e-3)
        assert got.spectra["ggn"].lambda_max < math.exp(-gap) * 100
        assert layer.block is not None
        scale = float(np.abs(layer.block).max())
        np.testing.assert_allclose(got.block, layer.block, atol=1e-4 * scale)
        B = layer.factors["expand"].B
        np.testing.assert_allclose(got.factors["expand"].B, B, atol=1e-4 * float(np.abs(B).max()))
        columns = got.columns().reshape(got.row.columns, -1).astype(np.float64)
        np.testing.assert_allclose(columns.T @ columns, layer.block, atol=1e-4 * scale)


def test_conditions_that_drown_in_float32_are_not_printed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    inputs = torch.randn(8, 6)
    inputs[:, 3] = inputs[:, 2] * (1 + 1e-4 * torch.randn(8))  # a direction that float32 can't tell from none
    batch = (inputs, torch.randint(3, (8,)))
    narrow = curvscope.analyze(model, batch, loss="cross_entropy").layers["0"].spectra["kfac_expand"]
    wide = curvscope.analyze(model, batch, loss="cross_entropy", dtype="float64").layers["0"].spectra["kfac_expand"]
    assert math.isnan(narrow.condition)
    assert "float64" in narrow.reason
    assert wide.condition > 1e6
    assert narrow.lambda_max == pytest.approx(wide.lambda_max, rel=1e-5)
