from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from curvscope.errors import EXIT_BAD_INPUT, BatchError
from curvscope.load.batch import load_batch
from curvscope.load.batches import open_batches

X = torch.arange(8.0).reshape(2, 4)
Y = torch.tensor([0, 1])


def write_h5(path: Path, content: dict[str, Any]) -> None:
    with h5py.File(path, "w") as file:
        for name, value in content.items():
            file[name] = np.asarray(value)


def write(path: Path, form: str, content: dict[str, torch.Tensor]) -> None:
    if form == "pt":
        torch.save(content, path)
    elif form == "legacy pt":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif form == "npz":
        with path.open("wb") as file:
            np.savez(file, **{n: t.numpy() for n, t in content.items()})
    elif form == "h5":
        write_h5(path, content)
    elif form == "h5 groups":
        write_h5(path, {name.replace(".", "/"): t for name, t in content.items()})
    else:
        save_file(content, path)


@pytest.mark.parametrize("form", ["pt", "legacy pt", "npz", "h5", "h5 groups", "safetensors"])
@pytest.mark.parametrize(
    ("keys", "args", "kwargs"),
    [(["inputs"], 1, []), (["inputs.0", "inputs.1"], 2, []), (["inputs.ids", "inputs.0"], 1, ["ids"])],
    ids=["one", "positional", "keyword"],
)
def test_batch_files(form: str, keys: list[str], args: int, kwargs: list[str], tmp_path: Path) -> None:
    path = tmp_path / "batch.dat"  # the suffix says nothing
    write(path, form, {**{key: X.clone() for key in keys}, "targets": Y})
    batch = load_batch(path)
    assert len(batch.inputs.args) == args
    assert list(batch.inputs.kwargs) == kwargs
    assert all(torch.equal(t, X) and t.dtype == X.dtype for t in batch.inputs.tensors().values())
    assert torch.equal(batch.targets, Y)
    assert batch.targets.dtype == torch.int64


PAIRS = {
    "tensor": (X, 1, []),
    "tuple": ((X, X), 2, []),
    "list": ([X], 1, []),
    "keywords": ({"a": X, "flag": True}, 0, ["a", "flag"]),
    "numpy": (X.numpy(), 1, []),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, tmp_path: Path) -> None:
    inputs, args, kwargs = PAIRS[name]
    batch = load_batch((inputs, Y))
    assert (len(batch.inputs.args), list(batch.inputs.kwargs)) == (args, kwargs)
    if name != "numpy":
        torch.save((inputs, Y), tmp_path / "b.pt")
        again = load_batch(str(tmp_path / "b.pt"))
        assert (len(again.inputs.args), list(again.inputs.kwargs)) == (args, kwargs)


def test_callable(factories: str) -> None:
    batch = open_batches(f"{factories}:batch").first()
    assert batch.inputs.args[0].shape == (2, 4)


def test_structured_targets_are_kept() -> None:
    assert set(load_batch({"inputs": X, "targets.a": Y, "targets.b": X}).targets) == {"a", "b"}


NAN = X.clone()
NAN[1, 2] = float("nan")
INF = X.clone()
INF[0, 0] = float("inf")


def npy(path: Path) -> Path:
    np.save(path / "a.npy", X.numpy())
    return path / "a.npy"


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path / "b.pt")
    return path / "b.pt"


def raw(path: Path, content: bytes) -> Path:
    (path / "b").write_bytes(content)
    return path / "b"


BAD: dict[str, tuple[Any, tuple[str, ...]]] = {
    "none": (lambda p: None, ("No batch", "--batch", 'and "targets"')),
    "missing file": (lambda p: p / "absent.pt", ("no such batch file", "absent.pt")),
    "folder": (lambda p: p, ("folder",)),
    "empty file": (lambda p: raw(p, b""), ("empty",)),
    "text": (lambda p: raw(p, b"a,b\n1,2\n"), ("known format",)),
    "damaged": (lambda p: raw(p, b"PK\x03\x04" + bytes(40)), ("can't be read",)),
    "damaged hdf5": (lambda p: raw(p, b"\x89HDF\r\n\x1a\n" + bytes(40)), ("can't be read",)),
    "npy": (npy, ("one array", "savez")),
    "objects": (lambda p: saved(p, {"inputs": X, "targets": Path("x")}), ("Python objects",)),
    "one tensor": (lambda p: saved(p, X), ("pair", "Tensor")),
    "three": (lambda p: (X, X, Y), ("tuple of 3",)),
    "no targets": (lambda p: saved(p, {"inputs": X, "labels": Y}), ("targets", "inputs, labels")),
    "no inputs": (lambda p: saved(p, {"x": X, "targets": Y}), ("inputs", "x, targets")),
    "both": (lambda p: {"inputs": X, "inputs.a": X, "targets": Y}, ("both",)),
    "gap": (lambda p: {"inputs.0": X, "inputs.2": X, "targets": Y}, ("[0, 2]",)),
    "empty batch": (lambda p: (X[:0], Y[:0]), ("empty", "[0, 4]")),
    "empty targets": (lambda p: (X, Y[:0]), ("empty", "targets")),
    "no tensor": (lambda p: ((1, 2), Y), ("no tensor",)),
    "odd inputs": (lambda p: ("text", Y), ("str",)),
    "nan": (lambda p: (NAN, Y), ("1 of 8", "index [1, 2]", "inputs[0]")),
    "inf": (lambda p: ({"a": INF}, Y), ("index [0, 0]", "inputs['a']")),
    "nan target": (lambda p: (X, NAN), ("targets",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_batches_are_refused_in_words(name: str, tmp_path: Path) -> None:
    make, words = BAD[name]
    with pytest.raises(BatchError) as caught:
        load_batch(make(tmp_path))
    error = caught.value
    assert error.exit_code == EXIT_BAD_INPUT
    assert error.what
    assert error.where
    assert error.remedy
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize(
    ("name", "word"),
    [("bad_batch", "pair"), ("fails", "no such thing"), ("number", "not a callable"), ("absent", "has no")],
)
def test_bad_callables(name: str, word: str, factories: str) -> None:
    with pytest.raises(BatchError, match=word):
        open_batches(f"{factories}:{name}")


def test_an_additive_mask_is_no_fault() -> None:
    """torch's own causal mask holds -inf; NaN, +inf or -inf among data are still refused."""
    mask = torch.nn.Transformer.generate_square_subsequent_mask(4)
    loaded = load_batch(((torch.randn(2, 4), mask), torch.zeros(2).long()))
    assert torch.equal(loaded.inputs.args[1], mask)
    for value in (float("nan"), float("inf")):
        broken = mask.clone()
        broken[0, 0] = value
        with pytest.raises(BatchError):
            load_batch(((torch.randn(2, 4), broken), torch.zeros(2).long()))
    data = torch.randn(2, 4)
    data[0, 0] = -torch.inf
    with pytest.raises(BatchError):
        load_batch((data, torch.zeros(2).long()))
