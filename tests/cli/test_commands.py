from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import curvscope
from curvscope.cli.app import app
from curvscope.errors import (
    AnalysisError,
    BatchError,
    CheckpointError,
    UsageError,
)
from curvscope.run import Run
from tests.synthetic import make_run

CLI = (sys.executable, "-m", "curvscope")


class Pipeline(types.ModuleType):
    """Stands in for the analysis: keeps what it was called with, then does what the test wants."""

    def __init__(self) -> None:
        super().__init__("curvscope.pipeline")
        self.called_with: dict[str, Any] = {}
        self.work: Callable[[], Run] = make_run

    def analyze(self, **arguments: Any) -> Run:
        self.called_with = arguments
        return self.work()


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pipeline:
    module = Pipeline()
    monkeypatch.setitem(sys.modules, "curvscope.pipeline", module)
    monkeypatch.chdir(tmp_path)
    return module


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_analyze_reports_and_writes(pipeline: Pipeline, tmp_path: Path) -> None:
    result = call("analyze", "runs/net.ckpt.pt")
    assert result.exit_code == 0, result.output
    assert "what deserves a look" in result.stdout
    assert "curvscope show net.ckpt.curvscope.h5 transformer" in result.stdout
    assert result.stdout.rstrip().endswith("written to net.ckpt.curvscope.h5")
    assert result.stderr == ""
    assert [file.name for file in tmp_path.iterdir()] == ["net.ckpt.curvscope.h5"]
    assert len(curvscope.open("net.ckpt.curvscope.h5").layers) == 9


def test_analyze_hands_on_every_option(pipeline: Pipeline) -> None:
    options = """
        --model net:build --batch b.npz --batches 3 --loss mse:reduction=sum --example-axis x=1 --example-axis 1=-2
        --example-index batch --trust --layers a.* --layers b --skip head --fisher probe --samples 4
        --measure spectral --measure kron_best --device cpu --dtype float64 --memory 1.5GiB --time 2min --seed 7
        --dump columns --dump blocks --dataset-size 50000
        --optimizer sgd --lr 0.1 --momentum 0.9 --nesterov --weight-decay 1e-4 --damping 0.5
        --clip-norm 1.5 -o out.h5 --quiet
    """
    result = call("analyze", "w.pt", *options.split())
    assert result.exit_code == 0, result.output
    arguments = dict(pipeline.called_with)
    assert callable(arguments.pop("progress"))
    assert arguments == {
        "model": "w.pt",
        "batch": "b.npz",
        "batches": 3,
        "loss": "mse:reduction=sum",
        "factory": "net:build",
        "trust": True,
        "optimizer": {
            "kind": "sgd",
            "lr": 0.1,
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 1e-4,
        },
        "fisher": "probe",
        "samples": 4,
        "layers": ["a.*", "b"],
        "skip": ["head"],
        "measure": ["spectral", "kron_best"],
        "device": "cpu",
        "dtype": "float64",
        "memory": 3 * 2**29,
        "time": 120.0,
        "example_axes": {"x": 1, "1": -2},
        "example_index": "batch",
        "seed": 7,
        "dump": ("columns", "blocks"),
        "dataset_size": 50000,
        "damping": 0.5,
        "clip_norm": 1.5,
    }
    assert Path("out.h5").exists()
    assert result.output == ""


def test_analyze_defaults(pipeline: Pipeline) -> None:
    call("analyze", "w.pt")
    kept = {key: value for key, value in pipeline.called_with.items() if key not in ("progress", "model")}
    assert {key for key, value in kept.items() if value is None} == {
        "batch", "loss", "factory", "optimizer", "samples", "layers", "skip", "measure", "memory", "example_axes",
        "example_index", "dataset_size", "damping", "clip_norm", "batches",
    }  # fmt: skip
    assert kept["time"] == 60.0
    assert kept["fisher"] == kept["device"] == "auto"


def test_json_is_all_there_is_on_stdout(pipeline: Pipeline) -> None:
    def noisy() -> Run:
        print("a model that prints")
        return make_run()

    pipeline.work = noisy
    result = call("analyze", "w.pt", "--format", "json")
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["tables"]["layers"]) == 9
    assert "a model that prints" in result.stderr
    assert "written to w.curvscope.h5" in result.stderr
    shown = call("show", "w.curvscope.h5", "--format", "json")
    assert json.loads(shown.stdout) == json.loads(result.stdout)


@pytest.mark.parametrize(
    ("severity", "findings", "code"),
    [("error", True, 1), ("info", True, 1), ("info", False, 0), ("warning", False, 0)],
)
def test_fail_on(pipeline: Pipeline, severity: str, findings: bool, code: int) -> None:
    pipeline.work = lambda: make_run(findings=findings)
    result = call("analyze", "w.pt", "--fail-on", severity)
    assert result.exit_code == code
    assert Path("w.curvscope.h5").exists()


def test_fail_on_counts_only_what_is_as_bad(pipeline: Pipeline) -> None:
    run = make_run()
    run.tables["findings"] = [row for row in run.findings if row.severity == "info"]
    pipeline.work = lambda: run
    assert call("analyze", "w.pt", "--fail-on", "warning").exit_code == 0


def fails(error: BaseException) -> Callable[[], Run]:
    def work() -> Run:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        pytest.param(
            CheckpointError("It is empty.", where="w.pt", remedy="Save it again."),
            3,
            ["error: It is empty.", "where: w.pt", "next: Save it again."],
            id="bad input",
        ),
        pytest.param(BatchError("No [targets]."), 3, ["error: No [targets]."], id="what only"),
        pytest.param(
            CheckpointError("Two lines:\nthe second", remedy="x" * 300),
            3,
            ["error: Two lines:", "       the second", "next: " + "x" * 300],
            id="long lines are not broken",
        ),
        pytest.param(UsageError("No.", where="--a"), 2, ["error: No.", "where: --a"], id="usage"),
        pytest.param(AnalysisError("It broke."), 4, ["error: It broke."], id="analysis"),
        pytest.param(KeyboardInterrupt(), 130, ["error: Interrupted."], id="Ctrl-C"),
    ],
)
def test_errors_in_three_parts(pipeline: Pipeline, error: BaseException, code: int, lines: list[str]) -> None:
    pipeline.work = fails(error)
    result = call("analyze", "w.pt")
    assert result.exit_code == code
    assert result.stderr.splitlines()[: len(lines)] == lines
    assert result.stdout == ""
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("error", [ZeroDivisionError("division\nby zero"), MemoryError(), RuntimeError("x" * 9999)])
def test_the_unexpected(pipeline: Pipeline, error: Exception) -> None:
    pipeline.work = fails(error)
    result = call("analyze", "w.pt")
    assert result.exit_code == 4
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert lines[-1].startswith("next: ")
    if isinstance(error, ZeroDivisionError):
        assert lines[0].endswith("ZeroDivisionError: division by zero")
        assert "--debug" in lines[-1]
    assert all(len(line) < 700 for line in lines)
    assert "Traceback" in call("analyze", "w.pt", "--debug").stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--memory", "8potatoes"], "no amount of memory", id="memory"),
        pytest.param(["--memory", "0GiB"], "no amount of memory", id="no memory"),
        pytest.param(["--time", "soon"], "no duration", id="time"),
        pytest.param(["--example-axis", "x"], "NAME=1", id="axis"),
        pytest.param(["--fisher", "fischer"], "auto, exact, probe, mc, empirical", id="fisher"),
        pytest.param(["--samples", "0"], "--samples", id="samples"),
        pytest.param(["--device", "tpu"], "auto, cpu, cuda", id="device"),
        pytest.param(["--dump", "all"], "factors, spectra, columns, blocks", id="dump"),
        pytest.param(["--measure", "all"], "spectral, kron_best", id="measure"),
        pytest.param(["--format", "xml"], "table, json", id="format"),
        pytest.param(["--fail-on", "doom"], "info, warning, error", id="fail on"),
        pytest.param(["--no-such-option"], "No such option", id="unknown option"),
        pytest.param(["--seed", "9" * 24], "--seed", id="seed too large"),
        pytest.param(["--seed", "-1"], "--seed", id="negative seed"),
        pytest.param(["--batches", "0"], "--batches", id="no batches"),
        pytest.param(["--lr", "fast"], "--lr", id="no number"),
        pytest.param(["--dataset-size", "many"], "--dataset-size", id="no count"),
    ],
)
def test_usage_errors(pipeline: Pipeline, arguments: list[str], words: str) -> None:
    result = call("analyze", "w.pt", *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert [line.partition(":")[0] for line in result.stderr.strip().split("\n")] == ["error", "where", "next"]
    assert result.stderr.count("curvscope analyze") == 2
    assert pipeline.called_with == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["analyse", "w.pt"], "No such command 'analyse'", id="misspelt"),
        pytest.param(["--nonsense"], "No such option: --nonsense", id="before the command"),
        pytest.param(["show"], "", id="help"),
        pytest.param(["show", "a.h5", "b", "c"], "unexpected extra argument", id="too many"),
        pytest.param(["export", "a.h5"], "Missing option '--to'", id="missing"),
    ],
)
def test_usage_errors_of_any_command(arguments: list[str], words: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    lines = [line.partition(":")[0] for line in result.stderr.strip().split("\n")]
    assert lines == ["error", "where", "next"] if words else "Usage" in result.output
    assert words in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param([], "not an earlier result", id="somebody's file"),
        pytest.param(["--force"], "not an earlier result", id="somebody's file, by force"),
        pytest.param(["-o", "nowhere/run.h5"], "does not exist", id="no folder"),
        pytest.param(["-o", ".", "--force"], "a folder has that name", id="folder"),
        pytest.param(["-o", "/dev/null", "--force"], "a device", id="device"),
        pytest.param(["-o", "/proc/run.h5"], "could not be written", id="a file system that takes no files"),
    ],
)
def test_output_is_checked_before_the_work(pipeline: Pipeline, arguments: list[str], words: str) -> None:
    Path("w.curvscope.h5").write_text("kept")
    result = call("analyze", "w.pt", *arguments)
    assert result.exit_code == 3
    assert words in result.stderr
    assert pipeline.called_with == {}
    assert Path("w.curvscope.h5").read_text() == "kept"


def test_force_replaces(pipeline: Pipeline) -> None:
    make_run(layers=1).save("w.curvscope.h5")
    refused = call("analyze", "w.pt")
    assert refused.exit_code == 3
    assert "exists already" in refused.stderr
    assert pipeline.called_with == {}
    assert call("analyze", "w.pt", "--force").exit_code == 0
    assert len(curvscope.open("w.curvscope.h5").layers) == 9


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        pytest.param(["show", "run.h5"], 0, "what deserves a look", id="overview"),
        pytest.param(["show", "run.h5", "wide"], 0, "linear, 30×40", id="layer"),
        pytest.param(["show", "run.h5", "nothing"], 2, "There is no layer 'nothing'", id="no such layer"),
        pytest.param(["show", "none.h5"], 3, "no such file", id="no such file"),
        pytest.param(["show", "text.h5"], 3, "not an HDF5 file", id="text"),
        pytest.param(["export", "run.h5", "--to", "npz"], 0, "wrote run.npz", id="export"),
        pytest.param(["export", "run.h5", "--to", "csv", "-o", "t"], 0, "wrote t", id="export to"),
        pytest.param(["export", "run.h5", "--to", "json", "-o", "text.h5"], 3, "not an earlier result", id="kept"),
        pytest.param(["export", "run.h5", "--to", "xml"], 2, "not one of npz", id="no such format"),
        pytest.param(["export", "run.h5"], 2, "--to", id="no format"),
        pytest.param(["export", "none.h5", "--to", "npz"], 3, "no such file", id="export of nothing"),
        pytest.param(["--version"], 0, f"curvscope {curvscope.__version__}", id="version"),
        pytest.param(["explode"], 2, "No such command", id="misspelt"),
    ],
)
def test_other_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run().save("run.h5")
    Path("text.h5").write_text("kept")
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert words in (result.stdout if code == 0 else result.stderr)
    assert Path("text.h5").read_text() == "kept"


LOADED = """
import sys
sys.argv = ["curvscope", *sys.argv[1:]]
from curvscope.cli.app import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "backpack", "pandas", "transformers", "scipy", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["analyze", "--help"],
        ["show", "run.h5"],
        ["show", "run.h5", "wide"],
        ["export", "run.h5", "--to", "npz"],
    ],
    ids=" ".join,
)
def test_reading_and_help_need_no_torch(tmp_path: Path, arguments: list[str]) -> None:
    make_run().save(tmp_path / "run.h5")
    done = subprocess.run([sys.executable, "-c", LOADED, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_the_package_itself_loads_nothing() -> None:
    code = """
        import sys
        import curvscope
        assert set(curvscope.__all__) <= set(dir(curvscope))
        heavy = {"torch", "numpy", "h5py", "rich", "typer", "curvscope.run"} & set(sys.modules)
        assert not heavy, heavy
        assert curvscope.Run.__name__ == "Run"
        assert issubclass(curvscope.errors.UsageError, curvscope.CurvscopeError)
        assert "torch" not in sys.modules
        try:
            curvscope.nothing
        except AttributeError as error:
            assert "nothing" in str(error)
        else:
            raise AssertionError
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


WORKING = """
import signal, sys, time, types
# under nohup the interrupt would be ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.synthetic import make_run
pipeline = types.ModuleType("curvscope.pipeline")
def analyze(progress, **arguments):
    for i in range(3):
        progress("backward passes", f"layer {i}", i, 3)
    WORK
    return make_run()
pipeline.analyze = analyze
sys.modules["curvscope.pipeline"] = pipeline
from curvscope.cli.app import main
sys.argv = ["curvscope", "analyze", "w.pt"]
main()
"""


def child(tmp_path: Path, work: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "COLUMNS": "100",
        "TERM": "xterm",
    }
    return subprocess.Popen(
        [sys.executable, "-c", WORKING.replace("WORK", work)], cwd=tmp_path, env=environment, **options
    )


def test_interrupted_from_the_keyboard(tmp_path: Path) -> None:
    work = "print('working', flush=True); time.sleep(60)"
    with child(tmp_path, work, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"working\n"
        process.send_signal(signal.SIGINT)
        process.wait()
        message = process.stderr.read().decode()
    assert process.returncode == 130
    assert message.startswith("error: Interrupted.")
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


def test_progress_is_shown_on_a_terminal_only(tmp_path: Path) -> None:
    with child(tmp_path, "pass", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.read() == b""
    (tmp_path / "w.curvscope.h5").unlink()
    parent, terminal = os.openpty()
    with child(tmp_path, "time.sleep(0.3)", stdout=subprocess.DEVNULL, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                shown += (part := os.read(parent, 4096))
            except OSError:
                break
            if not part:
                break
    os.close(parent)
    assert process.returncode == 0
    assert b"backward passes" in shown
    assert b"layer 2" in shown


def test_a_reader_that_stops_early(tmp_path: Path) -> None:
    make_run().save(tmp_path / "run.h5")
    for arguments in (["run.h5"], ["run.h5", "--format", "json"]):
        with subprocess.Popen(
            [*CLI, "show", *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 0


def test_ascii_terminals_do_not_break_it(tmp_path: Path) -> None:
    run = make_run()
    run.notes = ["‖G‖ 日本"]
    run.save(tmp_path / "run.h5")
    for arguments in (
        ["show", "run.h5"],
        ["show", "nö.h5"],
        ["show", "run.h5", "--format", "json"],
        ["export", "run.h5", "--to", "json", "-o", "ö.json"],
    ):
        done = subprocess.run(
            [*CLI, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
            capture_output=True,
        )
        assert done.returncode == (3 if "nö.h5" in arguments else 0), done.stderr
        assert done.stdout.isascii()
        assert b"Traceback" not in done.stderr
        if "--format" in arguments:
            assert json.loads(done.stdout)["notes"] == run.notes


@pytest.mark.parametrize("arguments", [["--help"], ["analyze", "--help"], ["--version"]], ids=" ".join)
def test_help_whose_reader_stops_early(tmp_path: Path, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*CLI, *arguments], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0
    assert done.stderr == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["show", "run.h5"], ["show", "run.h5", "--format", "json"], ["--help"]])
def test_a_full_disk_behind_standard_output(tmp_path: Path, arguments: list[str]) -> None:
    make_run().save(tmp_path / "run.h5")
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*CLI, *arguments], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 3
    assert done.stderr.startswith(b"error: The output could not be written: No space left on device.")
    assert b"Traceback" not in done.stderr


def test_help_lists_every_dump() -> None:
    words = " ".join(call("analyze", "--help").stdout.replace("│", " ").split())
    assert "factors (always" in words


def test_explain_prints_the_page_of_a_code() -> None:
    result = call("explain", "cs501")
    assert result.exit_code == 0
    for words in ("CS501", "unstable at this learning rate", "what it is", "why it matters", "threshold", "how to fix"):
        assert words in result.stdout


def test_explain_lists_all_codes() -> None:
    result = call("explain")
    assert result.exit_code == 0
    assert all(code in result.stdout for code in ("CS101", "CS215", "CS302", "CS508"))


def test_explain_names_near_codes() -> None:
    result = call("explain", "CS519")
    assert result.exit_code == 2
    assert "CS501" in result.stderr


def test_explain_needs_no_torch() -> None:
    code = "import sys; from curvscope.cli.app import app; app(['explain', 'CS101'], standalone_mode=False)"
    done = subprocess.run(
        [sys.executable, "-c", code + "; assert 'torch' not in sys.modules"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
