from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from curvscope.errors import EXIT_BAD_INPUT, CheckpointError
from curvscope.load.checkpoint import load_checkpoint


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class RunsCode:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


def refused(path: Path, *words: str, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **options)
    error = caught.value
    assert error.exit_code == EXIT_BAD_INPUT
    assert error.what
    assert error.where
    assert error.remedy
    for word in words:
        assert word in str(error)
    return error


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[n], theirs[n]) for n in ours)


WRAPPED = {
    "bare": lambda sd: sd,
    "state_dict": lambda sd: {"state_dict": sd, "epoch": 3},
    "model": lambda sd: {"model": sd},
    "model_state_dict": lambda sd: {"model_state_dict": sd, "optimizer_state_dict": None},
    "data parallel": lambda sd: {f"module.{n}": t for n, t in sd.items()},
    "compiled": lambda sd: {f"_orig_mod.{n}": t for n, t in sd.items()},
    "both": lambda sd: {"model": {f"module._orig_mod.{n}": t for n, t in sd.items()}},
    "compiled inside": lambda sd: {n.replace(".", "._orig_mod."): t for n, t in sd.items()},
    "lightning": lambda sd: {
        "state_dict": {f"model.{n}": t for n, t in sd.items()},
        "pytorch-lightning_version": "2.4",
        "global_step": 17,
        "optimizer_states": [],
    },
}


@pytest.mark.parametrize("form", WRAPPED)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_state_dict_forms(form: str, legacy: bool, tmp_path: Path, net: nn.Module, make_net: Any) -> None:
    path = tmp_path / "weights.bin"
    torch.save(WRAPPED[form](net.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    found = load_checkpoint(path, make_net)
    assert isinstance(found.model, nn.Module)
    assert same_weights(found.model, net)
    stripped = form in ("data parallel", "compiled", "both", "compiled inside", "lightning")
    assert any("stripped" in note for note in found.notes) == stripped
    assert found.step == (17 if form == "lightning" else None)


def test_a_prefix_that_is_the_models_own_stays(tmp_path: Path) -> None:
    model = nn.ModuleDict({"model": nn.Linear(2, 2)})
    torch.save(model.state_dict(), tmp_path / "w.pt")
    found = load_checkpoint(tmp_path / "w.pt", lambda: nn.ModuleDict({"model": nn.Linear(2, 2)}))
    assert not found.notes
    assert same_weights(found.model, model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_keep_their_dtype(dtype: torch.dtype, tmp_path: Path, net: nn.Module, make_net: Any) -> None:
    torch.save({n: t.to(dtype) for n, t in net.state_dict().items()}, tmp_path / "w.pt")
    found = load_checkpoint(tmp_path / "w.pt", make_net)
    assert {p.dtype for p in found.model.parameters()} == {dtype}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_need_one_name_and_stay_tied(tmp_path: Path) -> None:
    save_file({"embed.weight": torch.ones(5, 3).double()}, tmp_path / "w.safetensors")
    found = load_checkpoint(tmp_path / "w.safetensors", Tied)
    assert found.model.head.weight is found.model.embed.weight
    assert torch.equal(found.model.head.weight, torch.ones(5, 3).double())
    assert any("head.weight" in note for note in found.notes)


def test_safetensors_is_told_by_content(tmp_path: Path, net: nn.Module, make_net: Any) -> None:
    save_file(net.state_dict(), tmp_path / "weights.pt")
    assert same_weights(load_checkpoint(tmp_path / "weights.pt", make_net).model, net)


def test_meta_factory_is_filled(tmp_path: Path, net: nn.Module, make_net: Any) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pt")

    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return make_net()

    assert same_weights(load_checkpoint(tmp_path / "w.pt", on_meta).model, net)


TORCH_MODULES = {
    "sequential": lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU()),
    "convolution": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout()),
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
    "gelu transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16, activation="gelu"),
    "recurrent": lambda: nn.LSTM(4, 3),
    "containers": lambda: nn.ModuleDict({"a": nn.ModuleList([nn.Embedding(3, 2)])}),
    "one layer": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize("name", TORCH_MODULES)
def test_pickled_torch_modules_need_no_trust(name: str, tmp_path: Path) -> None:
    model = TORCH_MODULES[name]()
    torch.save(model, tmp_path / "m.pt")
    found = load_checkpoint(tmp_path / "m.pt")
    assert type(found.model) is type(model)
    assert found.name == type(model).__name__
    assert same_weights(found.model, model)


def test_wrapped_module_and_data_parallel(tmp_path: Path, net: nn.Module) -> None:
    torch.save({"model": net, "epoch": 2}, tmp_path / "m.pt")
    assert same_weights(load_checkpoint(tmp_path / "m.pt").model, net)
    torch.save(nn.DataParallel(net), tmp_path / "d.pt")
    refused(tmp_path / "d.pt", "DataParallel", "--trust")
    found = load_checkpoint(tmp_path / "d.pt", trust=True)
    assert type(found.model) is nn.Sequential
    assert any("DataParallel" in note for note in found.notes)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_foreign_classes_are_named_and_need_trust(legacy: bool, tmp_path: Path) -> None:
    torch.save(Foreign(), tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "m.pt", "test_checkpoint.Foreign", "--trust", "--model")
    assert type(load_checkpoint(tmp_path / "m.pt", trust=True).model).__name__ == "Foreign"


def test_a_whole_model_in_the_legacy_format_needs_trust(tmp_path: Path, net: nn.Module) -> None:
    torch.save(net, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "m.pt", "legacy format", "--trust")
    assert same_weights(load_checkpoint(tmp_path / "m.pt", trust=True).model, net)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_not_run(legacy: bool, tmp_path: Path, net: nn.Module, make_net: Any) -> None:
    marker = tmp_path / "marker"
    content = {"state_dict": net.state_dict(), "extra": RunsCode(marker)}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "m.pt", "open", "--trust", factory=make_net)
    assert not marker.exists()


def test_a_module_that_replaces_its_forward_is_refused(tmp_path: Path, net: nn.Sequential) -> None:
    net[0].__dict__["forward"] = nn.Linear(4, 5)
    torch.save(net, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "forward", "module 0")


def test_trusted_class_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(Foreign(), tmp_path / "m.pt")
    monkeypatch.delattr("test_checkpoint.Foreign")
    refused(tmp_path / "m.pt", "can't be found", "--model", trust=True)


def test_export_archive_needs_trust(tmp_path: Path, net: nn.Module) -> None:
    x = torch.randn(2, 4)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    refused(tmp_path / "net.pt2", "torch.export", "--trust")
    found = load_checkpoint(tmp_path / "net.pt2", trust=True)
    assert isinstance(found.model, torch.export.ExportedProgram)
    assert torch.equal(found.model.module()(x), net(x))


def write_truncated(path: Path) -> None:
    whole = path.with_suffix(".whole")
    torch.save(nn.Linear(30, 30).state_dict(), whole)
    path.write_bytes(whole.read_bytes()[:-900])


def write_corrupted(path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, path)
    data = bytearray(path.read_bytes())
    start = data.find(b"data.pkl")
    data[start + 64 : start + 90] = b"\x00" * 26
    path.write_bytes(bytes(data))


def write_torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), str(path))


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/readme.txt", "hello")


def write_sharded(path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save({"w": torch.zeros(2)}, checkpoint_id=path, no_dist=True)


BAD_FILES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "missing": (lambda path: None, ("no such file",)),
    "folder": (lambda path: path.mkdir(), ("folder without a config.json",)),
    "empty": (lambda path: path.write_bytes(b""), ("empty",)),
    "text": (lambda path: path.write_text("epoch,loss\n1,0.5\n"), ("text file", "epoch,loss")),
    "binary": (lambda path: path.write_bytes(bytes(range(200, 256)) * 4), ("no known format",)),
    "lfs pointer": (
        lambda path: path.write_text("version https://git-lfs\n"),
        ("lfs pull",),
    ),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90)), ("HDF5", "curvscope show")),
    "truncated": (write_truncated, ("damaged or incomplete",)),
    "corrupted": (write_corrupted, ("damaged", "again")),
    "torchscript": (write_torchscript, ("TorchScript", "torch.jit.load", "--model")),
    "other zip": (write_zip, ("zip",)),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), ("torch.save did not write",)),
    "truncated safetensors": (lambda path: path.write_bytes(b"\x08" + bytes(7) + b'{"a":1} '), ("damaged",)),
    "sharded": (write_sharded, ("sharded", "dcp_to_torch")),
    "optimizer only": (
        lambda path: torch.save(torch.optim.SGD([torch.zeros(2)], 0.1).state_dict(), path),
        ("optimizer's state",),
    ),
    "no weights": (lambda path: torch.save({"epoch": 3, "note": "x"}, path), ("epoch (int)", "note (str)")),
    "a list": (lambda path: torch.save([1, 2], path), ("list",)),
    "one tensor": (lambda path: torch.save(torch.zeros(2), path), ("Tensor",)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_in_words(name: str, tmp_path: Path, make_net: Any) -> None:
    write, words = BAD_FILES[name]
    path = tmp_path / "checkpoint.pt"
    write(path)
    refused(path, *words, factory=make_net)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_piece_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    write_sharded(tmp_path / "parts")
    refused(next((tmp_path / "parts").glob("*.distcp")), "sharded", "dcp_to_torch")


def test_state_dict_without_factory_lists_tensors_and_command(tmp_path: Path, net: nn.Module) -> None:
    path = tmp_path / "w.pt"
    torch.save(net.state_dict(), path)
    refused(path, "0.weight [5, 4]", "2.bias [3]", f"curvscope analyze {path} --model")


MISMATCHES = {
    "missing": (lambda sd: sd.pop("2.bias"), ("1 missing from the file (2.bias)",)),
    "unexpected": (lambda sd: sd.update(extra=torch.zeros(1)), ("1 not in the model (extra)",)),
    "misshapen": (lambda sd: sd.update({"0.bias": torch.zeros(7)}), ("0.bias: file [7], model [5]",)),
    "many": (lambda sd: sd.update({f"x{i}": torch.zeros(1) for i in range(40)}), ("and 34 more",)),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatched_weights_are_listed(name: str, tmp_path: Path, net: nn.Module, make_net: Any) -> None:
    change, words = MISMATCHES[name]
    weights = dict(net.state_dict())
    change(weights)
    torch.save(weights, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", *words, factory=make_net)


FACTORY_ERRORS = {
    "fails": ("no such thing",),
    "needs": ("depth",),
    "no_module": ("returned int",),
    "number": ("not a factory",),
    "absent": ("has no 'absent'", "make"),
    "make(width=1 + x)": ("plain Python values",),
}


@pytest.mark.parametrize("name", FACTORY_ERRORS)
def test_bad_factories(name: str, tmp_path: Path, net: nn.Module, factories: str) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pt")
    refused(tmp_path / "w.pt", *FACTORY_ERRORS[name], factory=f"{factories}:{name}")


@pytest.mark.parametrize(
    ("factory", "word"),
    [("no_such_module_here:make", "can't be imported"), ("models.py", "package.module:name")],
)
def test_factories_that_are_not_there(factory: str, word: str, tmp_path: Path, net: nn.Module) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pt")
    refused(tmp_path / "w.pt", word, factory=factory)


@pytest.mark.parametrize("name", ["make", "make(5)", "make(width=5)", "instance"])
def test_factory_from_the_current_folder(name: str, tmp_path: Path, net: nn.Module, factories: str) -> None:
    import sys

    torch.save(net.state_dict(), tmp_path / "w.pt")
    before = list(sys.path)
    state = torch.get_rng_state()
    found = load_checkpoint(tmp_path / "w.pt", f"{factories}:{name}")
    assert same_weights(found.model, net)
    assert sys.path == before
    assert torch.equal(torch.get_rng_state(), state)
