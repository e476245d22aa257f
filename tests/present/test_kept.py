"""A result never replaces what it is made from, nor a folder that holds anything else."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import curvscope
from curvscope.cli.app import app
from curvscope.errors import OutputError
from curvscope.present import hdf5
from curvscope.present.export import export
from curvscope.present.kept import check_kept
from tests.synthetic import make_run


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pair = torch.randn(6, 4), torch.randint(3, (6,))
    curvscope.capture("net.pt", nn.Sequential(nn.Linear(4, 3)), pair, loss="cross_entropy")
    content = {"inputs": pair[0], "targets": pair[1]}
    Path("many").mkdir()
    for path in ("batch.pt", "many/a.pt", "many/b.pt"):
        torch.save(content, path)
    Path("hard.pt").hardlink_to("net.pt")
    Path("soft.pt").symlink_to("net.pt")
    Path("nets.py").write_text("import torch")
    Path("far.pt").hardlink_to("many/b.pt")
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("net.pt", id="the checkpoint"),
        pytest.param("./many/../net.pt", id="by another path"),
        pytest.param("soft.pt", id="by a link"),
        pytest.param("hard.pt", id="by a hard link"),
        pytest.param("batch.pt --batch batch.pt", id="the batch"),
        pytest.param("many/b.pt --batch many", id="one of the batches"),
        pytest.param("far.pt --batch many", id="one of the batches, by a hard link"),
        pytest.param("many/run.h5 --batch many", id="beside the batches"),
        pytest.param("nets.py --model nets:mlp --batch batch.pt --loss nets:loss", id="the module of the model"),
    ],
)
def test_analyze_keeps_its_inputs(files: Path, options: str) -> None:
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    result = CliRunner().invoke(app, ["analyze", "net.pt", "--force", "-o", *options.split()])
    assert result.exit_code == 3, result.output
    assert "another place with -o" in result.output
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before


def test_a_folder_as_checkpoint(tmp_path: Path) -> None:
    weights, result = tmp_path / "model.safetensors", tmp_path / "run.h5"
    weights.write_text("weights")
    hdf5.write(make_run(), result)
    check_kept(result, (tmp_path, None, "pkg.module:callable"))
    check_kept(tmp_path / "new.h5", (tmp_path,))
    with pytest.raises(OutputError, match="belongs to"):
        check_kept(weights, (tmp_path,))


@pytest.mark.parametrize("to", ["npz", "csv"])
def test_export_keeps_the_run(tmp_path: Path, to: str) -> None:
    path = tmp_path / "run.h5"
    hdf5.write(make_run(), path)
    target = tmp_path if to == "csv" else path
    result = CliRunner().invoke(app, ["export", str(path), "--to", to, "-o", str(target), "--force"])
    assert result.exit_code == 3, result.output
    assert hdf5.read(path).layers


def test_tables_replace_tables_only(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    for _ in range(2):
        export(make_run(), folder, "csv", force=True)
    (folder / "notes.md").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.md"):
        export(make_run(), folder, "csv", force=True)
    assert sorted(os.listdir(tmp_path)) == ["tables"]
    assert (folder / "notes.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("batch", "target"), [(None, "net.pt"), (None, "hard.pt"), ("batch.pt", "batch.pt"), ("many", "many/run.h5")]
)
def test_save_keeps_what_the_run_is_made_from(
    files: Path, batch: str | None, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = curvscope.analyze("net.pt", batch, loss="cross_entropy", fisher="mc", samples=1, skip=())
    target = os.path.abspath(target)
    monkeypatch.chdir("/")
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    with pytest.raises(OutputError):
        run.save(target, force=True)
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before
    run.save(files / "run.h5")


def test_force_replaces_results_only(tmp_path: Path) -> None:
    run, target = make_run(layers=1), tmp_path / "r.h5"
    for name, content in (("nets.py", b"import torch"), ("net.pt", b"PK\x03\x04"), ("short.h5", b"\x89HDF")):
        (tmp_path / name).write_bytes(content)
        for force in (False, True):
            with pytest.raises(OutputError, match="not an earlier result"):
                run.save(tmp_path / name, force=force)
        assert (tmp_path / name).read_bytes() == content
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["inputs"] = [1.0]
    with pytest.raises(OutputError, match="not an earlier result"):
        run.save(tmp_path / "data.h5", force=True)
    target.touch()
    run.save(target, force=True)
    size = target.stat().st_size
    for cut in (size // 2, size - 1):
        os.truncate(target, cut)
        run.save(target, force=True)
        assert len(hdf5.read(target).layers) == 1


def test_a_run_read_back_keeps_its_checkpoint(files: Path) -> None:
    before = Path("net.pt").read_bytes()
    make_run(layers=1).save("run.h5")
    with pytest.raises(OutputError, match="not an earlier result"):
        curvscope.open("run.h5").save("net.pt", force=True)
    assert Path("net.pt").read_bytes() == before
