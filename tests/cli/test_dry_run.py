"""--dry-run: the plan as a page and as JSON, and nothing else; --batch with a folder and with a callable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import curvscope
from curvscope import pipeline
from curvscope.cli.app import app
from curvscope.extract import cost
from curvscope.extract.passes import Passes
from tests.many import cut

runner = CliRunner()
INPUTS, TARGETS = torch.linspace(-1, 1, 40).view(8, 5), torch.tensor([0, 1, 2, 2, 0, 1, 2, 0])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bundle") / "model.pt"
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    curvscope.capture(path, model, (INPUTS, TARGETS), loss="cross_entropy")
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_page(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("a dry run must not sweep")

    monkeypatch.setattr(Passes, "sweep", never)
    result = runner.invoke(app, ["analyze", str(bundle), "--dry-run"])
    assert result.exit_code == 0, result.output
    for words in ("nothing was analyzed", "3 backward passes in 1 sweep", "8 examples", "2 columns", "exact", "time"):
        assert words in result.output, words
    assert not list(tmp_path.iterdir())


def test_the_document(bundle: Path) -> None:
    result = runner.invoke(app, ["analyze", str(bundle), "--dry-run", "--format", "json", "--fisher", "probe"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["fisher"], document["columns"], document["examples"]) == ("probe", 8, 8)
    assert [layer["treatment"] for layer in document["layers"]] == ["estimated", "estimated"]
    assert document["total_seconds"] == pytest.approx(sum(document["seconds"].values()))
    assert 0 < document["kept_bytes"] < document["peak_bytes"]


def test_an_existing_result_does_not_matter(bundle: Path) -> None:
    Path("model.curvscope.h5").write_text("an older result")
    assert runner.invoke(app, ["analyze", str(bundle), "--dry-run"]).exit_code == 0
    assert runner.invoke(app, ["analyze", str(bundle)]).exit_code == 3


def test_why_a_layer_is_not_assessed(bundle: Path) -> None:
    planned = pipeline.plan(bundle, fisher="exact", memory="1MiB")
    assert {layer.treatment for layer in planned.layers} == {"not_assessed"}
    assert all("--memory" in layer.reason and layer.sweep == 0 for layer in planned.layers)


def test_errors_are_those_of_the_analysis(bundle: Path) -> None:
    assert runner.invoke(app, ["analyze", str(bundle), "--dry-run", "--batch", "absent.pt"]).exit_code == 3
    assert runner.invoke(app, ["analyze", "absent.pt", "--dry-run"]).exit_code == 3


def test_the_plan_is_what_runs(bundle: Path) -> None:
    planned, run = pipeline.plan(bundle), curvscope.analyze(bundle)
    assert planned.fisher == run.info.fisher
    assert [layer.name for layer in planned.layers] == list(run.layers)
    for layer in planned.layers:
        assert run.layers[layer.name].row.columns == planned.examples * planned.columns


def test_auto_decides_on_measured_seconds(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same estimate that a dry run prints: where it is over --time there are probes."""
    monkeypatch.setattr(Passes, "pass_seconds", lambda self: cost.PassSeconds(1.0, 30.0))
    assert pipeline.plan(bundle, time=1e-3).fisher == "probe"
    assert "61 s" in pipeline.plan(bundle, time=1e-3).reason
    monkeypatch.setattr(Passes, "pass_seconds", lambda self: cost.PassSeconds(1e-9, 1e-9))
    monkeypatch.setattr("curvscope.extract.choose.measure_seconds", lambda load, rates: 1e-9)
    monkeypatch.setattr("curvscope.extract.choose.keep_seconds", lambda load, rates: 1e-9)
    monkeypatch.setattr("curvscope.extract.choose.SETTLED", -1.0)
    assert pipeline.plan(bundle, time=1e-3).fisher == "exact"


def test_a_folder_of_batches(bundle: Path) -> None:
    folder = Path("batches")
    folder.mkdir()
    for i, (inputs, targets) in enumerate(cut((INPUTS, TARGETS), [3, 3, 2])):
        torch.save({"inputs": inputs, "targets": targets}, folder / f"{i}.pt")
    result = runner.invoke(app, ["analyze", str(bundle), "--batch", str(folder), "-o", "many.h5", "--quiet"])
    assert result.exit_code == 0, result.output
    whole, many = curvscope.analyze(bundle), curvscope.open("many.h5")
    for name, layer in whole.layers.items():
        assert many.layers[name].row.examples == 8
        for approximation, row in layer.errors.items():
            got = many.layers[name].errors[approximation].rel_frobenius
            assert got == pytest.approx(row.rel_frobenius, rel=1e-3), (name, approximation)
    (folder / "readme.md").write_text("stray")
    result = runner.invoke(app, ["analyze", str(bundle), "--batch", str(folder), "-o", "more.h5"])
    assert result.exit_code == 3
    assert "readme.md" in result.output


def test_a_callable_of_batches(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("curvscope_test_batches.py").write_text(
        "import torch\n"
        "def batches(count=2):\n"
        "    for _ in range(count):\n"
        "        yield torch.randn(4, 5), torch.randint(3, (4,))\n"
    )
    monkeypatch.syspath_prepend(".")
    spec = "curvscope_test_batches:batches(count=3)"
    result = runner.invoke(app, ["analyze", str(bundle), "--batch", spec, "--dry-run", "--format", "json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["examples"], document["batches"]) == (12, 3)
