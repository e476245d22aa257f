"""Checkpoints in float16 and bfloat16 (and float64): computed in the run's dtype, and said so whoever reads a run."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

import curvscope
from curvscope.present.json import document
from curvscope.present.terminal import render
from curvscope.run import Run

LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3


def analyzed(model: Any, given: Any = None, **options: Any) -> Run:
    settings: dict[str, Any] = {"loss": "cross_entropy", "fisher": "exact", "time": 1e-3, "layers": "0"} | options
    return curvscope.analyze(model, given or batch(), **settings)


def in_memory(model: nn.Module, folder: Path) -> Run:
    return analyzed(model)


def bundle(model: nn.Module, folder: Path) -> Run:
    inputs, targets = batch()
    stored = next(model.parameters()).dtype
    curvscope.capture(folder / "b.pt", model, (inputs.to(stored), targets), loss="cross_entropy")
    return curvscope.analyze(folder / "b.pt", fisher="exact", time=1e-3, layers="0")


def state_dict(model: nn.Module, folder: Path) -> Run:
    torch.save(model.state_dict(), folder / "w.pt")
    return analyzed(folder / "w.pt", factory=net)


def safetensors(model: nn.Module, folder: Path) -> Run:
    save_file(model.state_dict(), folder / "w.safetensors")
    return analyzed(folder / "w.safetensors", factory=net)


def pickled(model: nn.Module, folder: Path) -> Run:
    torch.save(model, folder / "m.pt")
    return analyzed(folder / "m.pt")


def same_numbers(got: Run, want: Run, tolerance: float) -> None:
    assert got.model.loss == pytest.approx(want.model.loss, rel=tolerance)
    for name, layer in want.layers.items():
        assert got.layers[name].spectra["ggn"].trace == pytest.approx(layer.spectra["ggn"].trace, rel=tolerance)
        for flavour, factors in layer.factors.items():
            mine = got.layers[name].factors[flavour]
            assert mine.B.dtype == np.float32
            np.testing.assert_allclose(mine.A, factors.A, rtol=tolerance, atol=tolerance * float(factors.A.max()))


SOURCES = [
    (in_memory, "float16"),
    *((source, "bfloat16") for source in (in_memory, bundle, state_dict, safetensors, pickled)),
]


@cache
def widened(dtype: str, *, inputs: bool) -> Run:
    """The run of the low-precision weights cast to float32 beforehand; `inputs`: those rounded, too."""
    x, targets = batch()
    return analyzed(net().to(LOW[dtype]).float(), (x.to(LOW[dtype]).float() if inputs else x, targets))


@pytest.mark.parametrize(("source", "dtype"), SOURCES)
def test_low_precision_is_computed_in_float32_and_said(
    source: Callable[[nn.Module, Path], Run], dtype: str, tmp_path: Path
) -> None:
    model = net().to(LOW[dtype]).eval()
    run = source(model, tmp_path)
    assert (run.info.dtype, run.info.source_dtype) == ("float32", dtype)
    assert any(f"stored as {dtype} are computed in float32" in note for note in run.notes)
    assert {p.dtype for p in model.parameters()} == {LOW[dtype]}
    # a bundle's own batch is stored in the model's dtype
    same_numbers(run, widened(dtype, inputs=source is bundle), 1e-5)


def test_float64_keeps_every_digit_of_bfloat16() -> None:
    model = net().to(torch.bfloat16)
    run = analyzed(model, dtype="float64", dump=("blocks",))
    want = analyzed(copy.deepcopy(model).double(), dtype="float64", dump=("blocks",))
    assert (run.info.source_dtype, want.info.source_dtype) == ("bfloat16", "")
    assert any("computed in float64" in note for note in run.notes)
    for name, layer in want.layers.items():
        np.testing.assert_array_equal(run.layers[name].block, layer.block)


def test_mixed_and_wide() -> None:
    mixed = net().to(torch.bfloat16)
    mixed[1].float()
    run = analyzed(mixed)
    assert run.info.source_dtype == "bfloat16, float32"
    assert any("stored as bfloat16 are computed" in note for note in run.notes)
    wide = analyzed(net().double())
    assert wide.info.source_dtype == "float64"
    assert any("stored as float64 are rounded to float32" in note for note in wide.notes)
    plain = analyzed(net())
    assert plain.info.source_dtype == ""
    assert not any("stored as" in note for note in plain.notes)


def test_every_reader_is_told(tmp_path: Path) -> None:
    run = analyzed(net().to(torch.float16))
    run.save(tmp_path / "r.h5")
    with h5py.File(tmp_path / "r.h5") as file:
        assert (file.attrs["dtype"], file.attrs["source_dtype"]) == ("float32", "float16")
    again = curvscope.open(tmp_path / "r.h5")
    assert again.info == run.info
    assert json.loads(json.dumps(document(again)))["source_dtype"] == "float16"
    for each in (run, again):
        text = io.StringIO()
        render(each, Console(file=text, width=120))
        assert "float32 on cpu, weights stored as float16" in text.getvalue()


def test_an_error_that_is_rounding_is_flagged() -> None:
    """K-FAC of one example with one row is exact: what float32 leaves of its error says that it is rounding."""
    inputs, targets = batch()
    for dtype, digits in (("float32", 1.2e-6), ("float64", 2.3e-15)):
        run = analyzed(net(), (inputs[:1], targets[:1]), dtype=dtype)
        for approximation in ("kfac_expand", "kfac_reduce"):
            row = run.layers["0"].errors[approximation]
            assert row.rel_frobenius < digits
            assert f"rounding of {dtype}" in row.reason
        several = analyzed(net(), dtype=dtype)
        assert not any("rounding" in row.reason for row in several.layers["0"].errors.values())
