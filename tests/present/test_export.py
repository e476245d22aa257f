from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import curvscope
from curvscope.errors import OutputError, UsageError
from curvscope.present import json as present_json
from curvscope.present.export import FORMATS, default_path, export
from curvscope.records import TABLES
from curvscope.run import Run
from tests.synthetic import make_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return curvscope.open(make_run(dumped=True).save(tmp_path / "run.h5"))


@pytest.mark.parametrize("to", ["npz", "safetensors"])
def test_arrays(run: Run, tmp_path: Path, to: str) -> None:
    path = export(run, tmp_path / "out", to)
    found = dict(np.load(path)) if to == "npz" else load_file(path)
    expected = make_run(dumped=True)
    layer = expected.layers["transformer.blocks.0.mlp/up"]
    prefix = "transformer.blocks.0.mlp%2Fup"
    assert layer.block is not None
    for name, values in {
        "factors/expand/A": layer.factors["expand"].A,
        "factors/reduce/B": layer.factors["reduce"].B,
        "spectrum/ggn": layer.spectrum["ggn"],
        "eigenvectors/expand/A": layer.eigenvectors["expand/A"],
        "columns": layer.columns(),
        "block": layer.block,
    }.items():
        assert found[f"{prefix}/{name}"].dtype == values.dtype
        assert np.array_equal(found[f"{prefix}/{name}"], values)
    assert {name.split("/")[0] for name in found} >= {"stem.conv", "100%25weird%2F.name", "wide"}
    assert path.stat().st_mode & 0o777 == (tmp_path / "run.h5").stat().st_mode & 0o777


def test_transposed_arrays_come_out_right(run: Run, tmp_path: Path) -> None:
    layer = run.layers["head"]
    layer.factors = {}
    layer.spectrum = {"ggn": np.arange(12.0).reshape(3, 4).T}
    assert np.array_equal(
        load_file(export(run, tmp_path / "out", "safetensors"))["head/spectrum/ggn"], layer.spectrum["ggn"]
    )


def test_csv_is_a_folder_of_tables(run: Run, tmp_path: Path) -> None:
    folder = export(run, tmp_path / "tables", "csv")
    assert sorted(file.name for file in folder.iterdir()) == sorted(f"{name}.csv" for name in TABLES)
    with (folder / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for before, after in zip(run.tables["errors"], rows, strict=True):
        assert after["reason"] == before.reason
        value = float(after["rel_frobenius"])
        assert value.hex() == before.rel_frobenius.hex() or math.isnan(value)


def test_json_has_everything_but_arrays(run: Run, tmp_path: Path) -> None:
    document = json.loads(export(run, tmp_path / "run.json", "json").read_text())
    assert document == json.loads(present_json.dumps(run))
    assert document["format"] == "curvscope-run"
    assert document["model"]["loss"] == run.model.loss
    assert set(document["tables"]) == set(TABLES)
    first, kron_best = document["tables"]["errors"][0], document["tables"]["errors"][4]
    assert first["rel_frobenius"] == 0.62
    assert first["rel_frobenius_stderr"] is None
    assert kron_best["rel_frobenius"] is None
    assert kron_best["status"] == "skipped"


def test_json_has_no_nan(run: Run) -> None:
    run.seconds["forever"] = math.inf

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = json.loads(present_json.dumps(run), parse_constant=refuse)
    assert document["seconds"]["forever"] is None


@pytest.mark.parametrize("to", FORMATS)
def test_what_is_there_is_kept(run: Run, tmp_path: Path, to: str) -> None:
    path = tmp_path / "out"
    export(run, path, to)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="exists already"):
        export(run, path, to)
    export(run, path, to, force=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("to", FORMATS)
def test_force_replaces_exports_only(run: Run, tmp_path: Path, to: str) -> None:
    """Files of the same kind that somebody else wrote, and sources."""
    (tmp_path / "nets.py").write_text("import torch")
    np.savez(tmp_path / "a.npz", weight=np.ones(3))
    save_file({"weight": np.ones(3)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    (tmp_path / "a.json").write_text('{"format": "mine"}')
    (tmp_path / "a.csv").mkdir()
    (tmp_path / "a.csv" / "train.csv").write_text("1,2")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    for name in (f"a.{to}", "nets.py"):
        with pytest.raises(OutputError):
            export(run, tmp_path / name, to, force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


@pytest.mark.parametrize("to", FORMATS)
def test_a_failure_leaves_nothing(run: Run, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("arrays", "row_values"):
        monkeypatch.setattr(f"curvscope.present.export.{name}", fail)
    monkeypatch.setattr("curvscope.present.json.dumps", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OutputError, match="No space left"):
        export(run, tmp_path / "out", to)
    assert sorted(tmp_path.iterdir()) == before


def test_unknown_format(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no format 'xml'"):
        export(run, tmp_path / "out", "xml")


@pytest.mark.parametrize(
    ("to", "name"), [("npz", "a.curvscope.npz"), ("csv", "a.curvscope-tables"), ("json", "a.curvscope.json")]
)
def test_default_path(to: str, name: str) -> None:
    assert default_path("runs/a.curvscope.h5", to) == Path(name)
