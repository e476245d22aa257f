"""--dry-run: the plan as a page and as JSON, and nothing else; --batch with a folder and with a callable."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import curvscope
from curvscope import pipeline
from curvscope.cli.app import app
from curvscope.errors import UsageError
from curvscope.extract import choose, cost
from curvscope.extract.passes import Passes
from curvscope.extract.plan import plan_layer
from curvscope.graph.sites import LayerSpec
from curvscope.measure.effort import Effort
from curvscope.planned import PlannedLayer, PlannedRun
from curvscope.present.terminal.plan import render_plan
from tests.many import cut

runner = CliRunner()
SAMPLES = Path(__file__).parents[2] / "sample_models"
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


def test_why_a_layer_is_not_assessed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curvscope.extract.ready.require_memory", lambda *_, **__: None)
    planned = pipeline.plan(bundle, fisher="exact", memory="1MiB")
    assert {layer.treatment for layer in planned.layers} == {"not_assessed"}
    assert all("--memory" in layer.reason and layer.sweep == 0 for layer in planned.layers)


def test_errors_are_those_of_the_analysis(bundle: Path) -> None:
    assert runner.invoke(app, ["analyze", str(bundle), "--dry-run", "--batch", "absent.pt"]).exit_code == 3
    assert runner.invoke(app, ["analyze", "absent.pt", "--dry-run"]).exit_code == 3


@pytest.mark.parametrize("command", ["plan", "analyze"])
def test_a_bound_that_nothing_fits_under_is_refused_with_the_least(bundle: Path, command: str) -> None:
    """What is named as the least is enough, and the plan's peak is then within it."""
    call = pipeline.plan if command == "plan" else curvscope.analyze
    with pytest.raises(UsageError, match=r"1 MiB is less than the \d") as caught:
        call(bundle, memory="1MiB")
    (least,) = re.findall(r"at least (\S+ MiB)", caught.value.remedy)
    bound = f"{float(least.split()[0]) * 1.01} MiB"
    planned = pipeline.plan(bundle, memory=bound)
    assert planned.peak_bytes <= planned.budget_bytes
    assert runner.invoke(app, ["analyze", str(bundle), "--dry-run", "--memory", "1MiB"]).exit_code == 2


@pytest.mark.parametrize("sample", ["graph_gnn", "digits_mlp", "in parts"])
def test_the_plan_is_what_runs(sample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, what a dry run calls exact, estimated and not assessed is so in the run."""
    given: tuple[Any, ...] = (SAMPLES / f"{sample}.pt",)
    options: dict[str, Any] = {}
    if sample == "in parts":
        original = choose.plan_layer
        monkeypatch.setattr(choose, "plan_layer", lambda *a, **o: original(*a, **{**o, "limit": 33}))
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
        given = (model, (torch.randn(12, 3), torch.arange(12) % 4))
        options = {"loss": "cross_entropy", "samples": 2}
    planned, run = pipeline.plan(*given, **options), curvscope.analyze(*given, **options)
    assert planned.fisher == run.info.fisher
    found = {name: _treatment(layer) for name, layer in run.layers.items()}
    assert {layer.name: layer.treatment for layer in planned.layers} == found
    if sample == "in parts":
        assert set(found.values()) == {"exact", "estimated"}
    steps = {row.status for row in run.tables["steps"]}
    assert (planned.seconds["steps"] > 0) == (steps != {"not_assessed"})


def _treatment(layer: Any) -> str:
    if not layer.row.columns:
        return "not_assessed"
    return "estimated" if layer.errors["kfac_expand"].fisher == "probe" else "exact"


@pytest.mark.parametrize(("seconds", "taken"), [(1e-6, True), (10.0, False)])
def test_steps_are_decided_alike_in_plan_and_run(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, taken: bool
) -> None:
    monkeypatch.setattr("curvscope.measure.stage.timed_effort", lambda *_: Effort(seconds, seconds))
    planned, run = pipeline.plan(bundle), curvscope.analyze(bundle)
    assert (planned.seconds["steps"] > 0) == taken
    assert ({row.status for row in run.tables["steps"]} != {"not_assessed"}) == taken
    if not taken:
        assert any("--measure steps" in note for note in planned.notes)


def test_long_names_and_reasons_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    name, reason = "encoder." * 12 + "projection", "its columns take more than there is: " + "raise it " * 12
    layer = PlannedLayer(name, "linear", 10, "not_assessed", "", 0, 0, 0.0, reason)
    seconds = {"passes": 1.0, "measure": 2.0, "steps": 0.0, "stability": 4.0}
    sizes = dict.fromkeys(
        ("examples", "batches", "piece_examples", "columns", "sweeps", "backward_passes", "budget_bytes", "peak_bytes"),
        1,
    )
    planned = PlannedRun(
        "net", "mse", "probe", "", "cpu", "float32", **sizes, kept_bytes=0, seconds=seconds, layers=[layer]
    )
    console = Console(width=80, record=True, file=io.StringIO())
    render_plan(planned, console)
    text = console.export_text()
    assert reason.strip() in text
    assert name in text.replace("\n", "").replace(" ", "")
    assert "about 7 s (passes 1 s, measures 2 s, steps none, stability 4 s)" in text
    assert "1 not assessed" in text


def test_what_draws_can_not_do_is_not_advised() -> None:
    spec = LayerSpec("a", "linear", "a.weight", None, 4, 3, None)
    planned = plan_layer(spec, 8, 4, 1, itemsize=4, draws=True, limit=10)
    assert planned.form is None
    assert "--samples" in planned.reason
    assert "probe" not in planned.reason


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


@pytest.mark.parametrize(
    ("name", "memory", "fisher"),
    [
        ("digits_mlp", "60MiB", "auto"),
        ("digits_mlp", "64MiB", "exact"),
        ("digits_mlp", "57MiB", "probe"),
        ("digits_cnn", "58MiB", "exact"),
    ],
)
def test_the_bound_that_would_do_does(name: str, memory: str, fisher: str) -> None:
    """Followed once, it leaves nothing out of the layers, nor the steps of the whole network."""
    planned = pipeline.plan(SAMPLES / f"{name}.pt", memory=memory, fisher=fisher)
    assert planned.peak_bytes <= planned.budget_bytes
    said = " ".join([*(layer.reason for layer in planned.layers), *planned.notes])
    named = re.findall(r"(?:fit under --memory |: )([\d.]+) MiB(?: would do|\.)", said)
    assert named, said
    enough = pipeline.plan(SAMPLES / f"{name}.pt", memory=f"{max(map(float, named))}MiB", fisher=fisher)
    wanted = "estimated" if fisher == "probe" else "exact"
    assert {(layer.treatment, layer.reason) for layer in enough.layers} == {(wanted, "")}
    if fisher == "exact":  # of these the steps of the whole network are one
        assert not any("steps" in note for note in enough.notes), enough.notes
