"""Bad input through the real command line: exit code 3, three parts, no traceback, no file left behind."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import curvscope
from curvscope.cli.app import app
from tests.synthetic import make_run

FACTORIES = """
    import torch
    from torch import nn

    def net(): return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    def wider(): return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    def deeper(): return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 3))
    def fails(): raise ValueError("no such size")
    def words(): return "a network"
    def unlinear(): return nn.Sequential(nn.LayerNorm(4))
    def frozen(): return net().requires_grad_(False)

    def vector_loss(f, y): return f.sum(1)
    def coupled_loss(f, y): return f.mean() ** 2
    def concave_loss(f, y): return -(f ** 2).sum()
"""


class Foreign:
    """A class that no allow-list knows."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def write_state(change: Callable[[dict[str, torch.Tensor]], None] = lambda state: None) -> None:
    state = network().state_dict()
    change(state)
    torch.save(dict(state), "net.pt")


def write_batch(inputs: torch.Tensor | None = None, targets: torch.Tensor | None = None) -> None:
    torch.manual_seed(1)
    torch.save(
        {
            "inputs": torch.randn(6, 4) if inputs is None else inputs,
            "targets": torch.randint(3, (6,)) if targets is None else targets,
        },
        "batch.pt",
    )


def poison(state: dict[str, torch.Tensor]) -> None:
    state["2.weight"][0, 0] = float("nan")


def truncate() -> None:
    write_state()
    data = Path("net.pt").read_bytes()
    Path("net.pt").write_bytes(data[: len(data) // 2])


def foreign() -> None:
    torch.save({"model": Foreign()}, "net.pt")


def script() -> None:
    torch.jit.save(torch.jit.trace(network(), torch.randn(1, 4)), "net.pt")


def overflow() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    torch.save(model.state_dict(), "net.pt")


def existing() -> None:
    write_state()
    make_run(layers=1).save("net.curvscope.h5")


MODEL = ["--model", "nets:net"]
LOSS = ["--loss", "cross_entropy"]
ALL = [*MODEL, "--batch", "batch.pt", *LOSS]

# name: (what is written first, options, words that the message must hold)
CASES: dict[str, tuple[Callable[[], None], list[str], list[str]]] = {
    "missing_file": (lambda: None, ALL, ["net.pt"]),
    "directory": (lambda: Path("net.pt").mkdir(), ALL, ["folder"]),
    "empty_file": (lambda: Path("net.pt").touch(), ALL, ["empty"]),
    "truncated_zip": (truncate, ALL, ["net.pt"]),
    "text_file": (lambda: Path("net.pt").write_text("loss 0.3\n" * 50) and None, ALL, ["text"]),
    "torchscript": (script, ALL, ["TorchScript"]),
    "foreign_class": (foreign, ALL, ["Foreign", "--trust"]),
    "no_model": (write_state, ["--batch", "batch.pt", *LOSS], ["0.weight", "[5, 4]", "--model"]),
    "factory_fails": (write_state, ["--model", "nets:fails", "--batch", "batch.pt", *LOSS], ["no such size"]),
    "factory_no_module": (write_state, ["--model", "nets:words", "--batch", "batch.pt", *LOSS], ["str"]),
    "factory_absent": (write_state, ["--model", "nets:nothing", "--batch", "batch.pt", *LOSS], ["nothing"]),
    "misshapen": (write_state, ["--model", "nets:wider", "--batch", "batch.pt", *LOSS], ["0.weight", "[6, 4]"]),
    "missing_keys": (write_state, ["--model", "nets:deeper", "--batch", "batch.pt", *LOSS], ["3.weight"]),
    "nan_weight": (lambda: write_state(poison), ALL, ["2.weight", "NaN"]),
    "overflow_on_the_way": (overflow, ALL, ["layer 0"]),
    "no_batch": (write_state, [*MODEL, *LOSS], ["--batch"]),
    "batch_absent": (write_state, [*MODEL, *LOSS, "--batch", "other.npz"], ["other.npz"]),
    "refused_shape": (lambda: write_state() or write_batch(torch.randn(6, 7)), ALL, ["[6, 7]"]),
    "refused_dtype": (lambda: write_state() or write_batch(torch.ones(6, 4).long()), ALL, ["int64"]),
    "nan_batch": (lambda: write_state() or write_batch(torch.full((6, 4), float("nan"))), ALL, ["NaN"]),
    "empty_batch": (lambda: write_state() or write_batch(torch.zeros(0, 4), torch.zeros(0).long()), ALL, ["empty"]),
    "target_range": (lambda: write_state() or write_batch(targets=torch.full((6,), 7)), ALL, ["7"]),
    "target_dtype": (lambda: write_state() or write_batch(targets=torch.rand(6)), ALL, ["float32"]),
    "target_count": (lambda: write_state() or write_batch(targets=torch.randint(3, (5,))), ALL, ["[5]"]),
    "no_loss": (write_state, [*MODEL, "--batch", "batch.pt"], ["cross_entropy"]),
    "unknown_loss": (write_state, [*MODEL, "--batch", "batch.pt", "--loss", "hinge"], ["hinge", "cross_entropy"]),
    "vector_loss": (write_state, [*MODEL, "--batch", "batch.pt", "--loss", "nets:vector_loss"], ["scalar"]),
    "coupled_loss": (write_state, [*MODEL, "--batch", "batch.pt", "--loss", "nets:coupled_loss"], ["examples"]),
    "concave_loss": (write_state, [*MODEL, "--batch", "batch.pt", "--loss", "nets:concave_loss"], ["convex"]),
    "no_linear_layer": (
        lambda: torch.save(nn.Sequential(nn.LayerNorm(4)).state_dict(), "net.pt"),
        ["--model", "nets:unlinear", "--batch", "batch.pt", *LOSS],
        ["no linear layer"],
    ),
    "no_layer_matches": (write_state, [*ALL, "--layers", "conv*"], ["0, 2"]),
    "all_frozen": (write_state, ["--model", "nets:frozen", "--batch", "batch.pt", *LOSS], ["frozen"]),
    "unwritable_output": (write_state, [*ALL, "-o", "nowhere/run.h5"], ["nowhere"]),
    "existing_output": (existing, ALL, ["--force"]),
    "small_training_set": (write_state, [*ALL, "--dataset-size", "5"], ["5 examples", "batch has 6", "--dataset-size"]),
    "cuda_absent": (write_state, [*ALL, "--device", "cuda"], ["CUDA"]),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(textwrap.dedent(FACTORIES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "nets", raising=False)
    write_batch()
    return tmp_path


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, folder: Path) -> None:
    if name == "cuda_absent" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    prepare, options, words = CASES[name]
    prepare()
    before = {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in str(path)
    }

    result = CliRunner().invoke(app, ["analyze", "net.pt", *options])

    assert result.exit_code == 3, result.output
    lines = result.stderr.split("\n")
    assert lines[0].startswith("error: "), result.stderr
    assert any(line.strip().startswith("where:") for line in lines), result.stderr
    assert any(line.strip().startswith("next:") for line in lines), result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    flat = " ".join(result.stderr.split())
    for word in words:
        assert word in flat, result.stderr
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in str(path)}
    assert after == before


USAGE = {
    "no training set": (["--dataset-size", "0"], "at least one example"),
    "no such optimizer": (["--optimizer", "lion"], "no optimizer whose stability is known"),
    "no such setting": (["--optimizer", "adam:lr=0.1,momentum=0.9"], "Adam has no momentum"),
    "setting beside it": (["--optimizer", "rmsprop", "--nesterov"], "RMSprop has no nesterov"),
}


@pytest.mark.parametrize("name", USAGE)
def test_usage_is_refused_before_anything_is_read(name: str, folder: Path) -> None:
    options, words = USAGE[name]
    result = CliRunner().invoke(app, ["analyze", "absent.pt", *options])
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())
    assert [line.partition(":")[0] for line in result.stderr.strip().split("\n")] == ["error", "where", "next"]


def test_a_setting_that_the_stored_optimizer_does_not_have(folder: Path) -> None:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "net.pt")
    result = CliRunner().invoke(app, ["analyze", "net.pt", *ALL, "--momentum", "0.9"])
    assert result.exit_code == 2, result.output
    assert "AdamW has no momentum" in result.stderr
    assert "beta1, beta2, eps" in result.stderr


def test_the_whole_way(folder: Path) -> None:
    """From a state_dict and a batch file to a report, a file, and the file read back."""
    write_state()
    result = CliRunner().invoke(app, ["analyze", "net.pt", *ALL, "--format", "json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    run = curvscope.open(folder / "net.curvscope.h5")
    assert [row["name"] for row in document["tables"]["layers"]] == list(run.layers) == ["0", "2"]
    batch = torch.load("batch.pt", weights_only=True)
    live = curvscope.analyze(network(), (batch["inputs"], batch["targets"]), loss="cross_entropy")
    for name, layer in live.layers.items():
        assert repr(dict(run.layers[name].errors)) == repr(dict(layer.errors))
    assert run.layers["2"].errors["kfac_expand"].rel_frobenius > 0
    shown = CliRunner().invoke(app, ["show", "net.curvscope.h5", "2"])
    assert shown.exit_code == 0
    assert "kfac_expand" in shown.stdout
