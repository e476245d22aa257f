from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from curvscope.errors import EXIT_BAD_INPUT, CheckpointError
from curvscope.load import load_problem
from curvscope.load.archive import (
    CONSTANTS,
    MODEL,
    SAMPLE_INPUTS,
    WEIGHTS,
    read_archive,
    write_archive,
)


def archive_of(model: nn.Module, x: torch.Tensor) -> bytes:
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    program._example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@pytest.fixture
def content(net: nn.Module, pair: Any) -> dict[str, Any]:
    """What a bundle holds, written here by hand: the format is what the two sides agree on."""
    return {
        "format": "curvscope-bundle",
        "version": 1,
        "graph": as_tensor(archive_of(net, pair[0])),
        "batch": {"inputs": {"args": (pair[0],), "kwargs": {}}, "targets": pair[1]},
        "example_axes": {"0": 0},
        "loss": {"name": "cross_entropy", "settings": {"label_smoothing": 0.1}},
        "optimizer": None,
        "step": 3,
    }


def with_members(change: Callable[[dict[str, bytes]], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(content: dict[str, Any]) -> None:
        members = dict(read_archive(content["graph"].numpy().tobytes()).members)
        change(members)
        content["graph"] = as_tensor(write_archive(members))

    return apply


def test_reading(content: dict[str, Any], net: nn.Module, pair: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "b.bin")
    problem = load_problem(tmp_path / "b.bin")
    assert isinstance(problem.model, torch.export.ExportedProgram)
    assert torch.equal(problem.model.module()(*problem.inputs.args), net(pair[0]))
    assert (problem.loss.label, problem.step) == ("cross_entropy(label_smoothing=0.1)", 3)
    assert problem.optimizer is None
    other = load_problem(tmp_path / "b.bin", (pair[0][:2], pair[1][:2]), "mse", step=9)
    assert (len(other.inputs.args[0]), other.loss.name, other.step) == (2, "mse", 9)


def test_with_a_factory_the_weights_are_read_without_the_graph(
    content: dict[str, Any], net: nn.Module, make_net: Any, pair: Any, tmp_path: Path
) -> None:
    with_members(lambda m: m.update({MODEL: b'{"schema_version": {"major": 99}}'}))(content)
    torch.save(content, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="--model"):
        load_problem(tmp_path / "b.pt")
    problem = load_problem(tmp_path / "b.pt", factory=make_net)
    assert torch.equal(problem.model(*problem.inputs.args), net(pair[0]))


def marker_payload(path: Path) -> bytes:
    class RunsCode:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(path), "w"))

    return pickle.dumps(RunsCode())


@pytest.mark.parametrize("member", [SAMPLE_INPUTS, "data/weights/model.pt", "data/constants/model.pt"])
def test_a_pickled_payload_is_refused(member: str, content: dict[str, Any], tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def plant(members: dict[str, bytes]) -> None:
        members[member] = marker_payload(marker)
        members.pop({"data/weights/model.pt": WEIGHTS, "data/constants/model.pt": CONSTANTS}.get(member, ""), None)

    with_members(plant)(content)
    torch.save(content, tmp_path / "b.pt")
    for trust in (False, True):
        with pytest.raises(CheckpointError, match="could run code") as caught:
            load_problem(tmp_path / "b.pt", trust=trust)
        assert caught.value.exit_code == EXIT_BAD_INPUT
        assert "graph" in caught.value.where
    assert not marker.exists()


BREAK: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda c: c.update(version=2), "version 2"),
    "no version": (lambda c: c.pop("version"), "version None"),
    "no graph": (lambda c: c.pop("graph"), "no 'graph'"),
    "no batch": (lambda c: c.pop("batch"), "no 'batch'"),
    "no axes": (lambda c: c.pop("example_axes"), "no 'example_axes'"),
    "no loss": (lambda c: c.pop("loss"), "no 'loss'"),
    "no optimizer": (lambda c: c.pop("optimizer"), "no 'optimizer'"),
    "no step": (lambda c: c.pop("step"), "no 'step'"),
    "graph no bytes": (lambda c: c.update(graph=torch.zeros(3)), "graph is no tensor of bytes"),
    "graph damaged": (lambda c: c.update(graph=c["graph"][:-200]), "graph can't be read"),
    "no targets": (lambda c: c["batch"].pop("targets"), "no 'targets'"),
    "no inputs": (lambda c: c["batch"].pop("inputs"), "no 'inputs'"),
    "inputs of another form": (
        lambda c: c["batch"].update(inputs=torch.zeros(2)),
        "batch inputs is a Tensor",
    ),
    "words for weights": (lambda c: c["loss"].update(settings={"weight": "abc"}), "settings of the wrong kind"),
    "words for a number": (
        lambda c: c["loss"].update(settings={"label_smoothing": "abc"}),
        "settings of the wrong kind",
    ),
    "mode of another form": (lambda c: c.update(mode=3), "mode is a int"),
    "unknown loss": (lambda c: c["loss"].update(name="hinge"), "hinge"),
    "unknown setting": (lambda c: c["loss"].update(settings={"a": 1}), "'a'"),
    "optimizer": (lambda c: c.update(optimizer={"class": "SGD"}), "no 'param_names'"),
    "step": (lambda c: c.update(step="three"), "step is a str"),
    "axes": (lambda c: c.update(example_axes={"0": 0, "1": 0}), "takes 2 tensors"),
    "axis": (lambda c: c.update(example_axes={"0": "x"}), "example_axes"),
}


@pytest.mark.parametrize("name", BREAK)
def test_broken_bundles(name: str, content: dict[str, Any], tmp_path: Path) -> None:
    change, word = BREAK[name]
    change(content)
    torch.save(content, tmp_path / "b.pt")
    with pytest.raises(Exception, match=word) as caught:
        load_problem(tmp_path / "b.pt")
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert "b.pt" in caught.value.where
    assert caught.value.remedy
