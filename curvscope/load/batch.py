"""One batch: the model's inputs and the targets, from memory or a file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from curvscope.errors import BatchError
from curvscope.load.importing import describe, listed
from curvscope.load.problem import Batch, Inputs
from curvscope.load.sniff import sniff

FILE_FORMS = (
    'A batch file (.pt, .npz, .h5, .safetensors) holds "inputs" (or "inputs.<keyword>", "inputs.0", ...) and "targets".'
)


def load_batch(batch: Any) -> Batch:
    """The batch given as `(inputs, targets)` or a file.

    `inputs` is a tensor, a tuple or list (positional arguments) or a mapping (keyword arguments). Files are
    told apart by content. Every tensor stays as stored.

    Raises:
        BatchError: the batch can't be read, lacks a part, is empty, or holds NaN or Inf.
    """
    if batch is None:
        raise BatchError(
            "No batch was given, and the checkpoint holds none.",
            where="batch (--batch)",
            remedy=f"Give --batch FILE or --batch package.module:callable. {FILE_FORMS}",
        )
    if isinstance(batch, Batch):
        found = batch
    elif isinstance(batch, (str, os.PathLike)):
        found = _from_text(batch)
    else:
        found = pair_batch(batch, "batch")
    check_batch(found)
    return found


def named_axes(axes: Mapping[str, int] | Mapping[int, int] | None) -> dict[str, int]:
    """Example axes by name: a position may be given as a number, too."""
    return {str(name): axis for name, axis in (axes or {}).items()}


def check_batch(batch: Batch) -> None:
    """Refuse what no analysis can use: no tensor, a sparse one, no example, NaN or Inf.

    Raises:
        BatchError: naming the entry, and the first index where a number is not finite.
    """
    tensors = _named_tensors(batch)
    if not any(name.startswith("inputs") for name in tensors):
        raise BatchError(
            "The inputs hold no tensor.",
            where=batch.source,
            remedy="Give the model's arguments as a tensor, a tuple of tensors or a dict of keyword tensors; lists of "
            "numbers become one by torch.tensor(list).",
        )
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
            kind = "quantized" if tensor.is_quantized else kind
            raise BatchError(
                f"{name} is a {kind} tensor; curvscope reads ordinary (dense) tensors.",
                where=f"{batch.source}, {name}",
                remedy="Convert it with .to_dense(), .to_padded_tensor(0.0) or .dequantize().",
            )
        if tensor.numel() == 0:
            raise BatchError(
                f"The batch is empty: {name} has shape {list(tensor.shape)}.",
                where=f"{batch.source}, {name}",
                remedy="Give a batch of at least one example.",
            )
        if tensor.is_floating_point() or tensor.is_complex():
            bad = ~torch.isfinite(tensor)
            if bool(bad.any()) and not _additive_mask(tensor):
                index = tuple(int(i) for i in bad.nonzero()[0])
                raise BatchError(
                    f"{name} holds {int(bad.sum())} of {tensor.numel()} numbers that are NaN or Inf, "
                    f"the first at index {list(index)}.",
                    where=f"{batch.source}, {name}",
                    remedy="Clean the data, or choose another batch. A mask to be added holds 0 and -inf only.",
                )


def _additive_mask(tensor: Tensor) -> bool:
    """Whether the tensor is an attention mask to be added: 0 and -inf only, as torch's own causal masks are."""
    return not tensor.is_complex() and bool(((tensor == 0) | (tensor == -torch.inf)).all())


def _named_tensors(batch: Batch) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for root, value in (
        ("inputs", batch.inputs.args),
        ("inputs", dict(batch.inputs.kwargs)),
        ("targets", batch.targets),
    ):
        for path, leaf in tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                named[root + keystr(path)] = leaf
    return named


def _from_text(text: str | os.PathLike[str]) -> Batch:
    path = Path(text)
    if path.is_file():
        return _from_file(path)
    raise BatchError(
        "There is no such batch file." if not path.is_dir() else "The batch is a folder, not a file.",
        where=str(text),
        remedy=f"Check the path. {FILE_FORMS}",
    )


def pair_batch(pair: Any, source: str) -> Batch:
    """What a pair `(inputs, targets)`, or a mapping with these keys, holds; not checked yet.

    Raises:
        BatchError: it is neither.
    """
    if isinstance(pair, Mapping):
        return _from_keys(dict(pair), source)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        size = f" of {len(pair)}" if isinstance(pair, (tuple, list)) else ""
        raise BatchError(
            f"A batch is a pair (inputs, targets); got a {type(pair).__name__}{size}.",
            where=source,
            remedy="Give (inputs, targets); inputs is a tensor, a tuple (positional) or a dict (keyword arguments).",
        )
    return Batch(_as_inputs(pair[0], source), _as_tensors(pair[1]), source)


def _as_inputs(value: Any, source: str) -> Inputs:
    if isinstance(value, Inputs):
        return value
    value = _as_tensors(value)
    if isinstance(value, Tensor):
        return Inputs((value,))
    if isinstance(value, Mapping):
        return Inputs(kwargs={str(name): item for name, item in value.items()})
    if isinstance(value, (tuple, list)):
        return Inputs(tuple(value))
    raise BatchError(
        f"Inputs of type {type(value).__name__} can't be passed to a model.",
        where=source,
        remedy="Give a tensor, a tuple (positional arguments) or a dict (keyword arguments).",
    )


def _as_tensors(value: Any) -> Any:
    """NumPy arrays as tensors, also inside plain containers."""
    if isinstance(value, (np.ndarray, np.generic)):
        return torch.as_tensor(np.array(value))
    if type(value) in (tuple, list):
        return type(value)(_as_tensors(item) for item in value)
    if isinstance(value, Mapping):
        return {name: _as_tensors(item) for name, item in value.items()}
    return value


def _from_file(path: Path) -> Batch:
    try:
        kind, _ = sniff(path)
        if kind == "empty":
            raise BatchError("The batch file is empty (0 bytes).", where=str(path), remedy=FILE_FORMS)
        if kind == "hdf5":
            content: Any = _read_hdf5(path)
        elif kind == "zip":
            with zipfile.ZipFile(path) as archive:
                numpy_file = any(name.endswith(".npy") for name in archive.namelist())
            content = _read_npz(path) if numpy_file else _read_torch(path)
        elif kind == "torch":
            content = _read_torch(path)
        elif kind == "safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        elif kind == "npy":
            raise BatchError(
                "A .npy file holds one array; a batch needs inputs and targets.",
                where=str(path),
                remedy="Write both with np.savez(path, inputs=..., targets=...).",
            )
        else:
            raise BatchError("This is no batch file of a known format.", where=str(path), remedy=FILE_FORMS)
    except BatchError:
        raise
    except Exception as cause:
        raise BatchError(
            f"The batch file can't be read: {describe(cause)}.",
            where=str(path),
            remedy=f"It may be damaged or incomplete: write it again. {FILE_FORMS}",
        ) from cause
    return pair_batch(content, str(path))


def _read_torch(path: Path) -> Any:
    import pickle

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as cause:
        raise BatchError(
            "The batch file holds Python objects, which could run code when read.",
            where=str(path),
            remedy='Save tensors only: torch.save({"inputs": inputs, "targets": targets}, path).',
        ) from cause


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _read_hdf5(path: Path) -> dict[str, Any]:
    import h5py

    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name.replace("/", ".")] = item[()]

    with h5py.File(path, "r") as file:
        if file.attrs.get("format") == "curvscope-run":
            raise BatchError(
                "This is the result of an analysis, not a batch.",
                where=str(path),
                remedy=f"See it with: curvscope show {path}",
            )
        file.visititems(visit)
    return found


def _from_keys(content: dict[Any, Any], source: str) -> Batch:
    keys = [str(key) for key in content]
    if "inputs" in content:
        if any(key.startswith("inputs.") for key in keys):
            raise BatchError(
                'The batch holds both "inputs" and "inputs.<name>"; which one is meant is unclear.',
                where=f"{source}, keys {listed(keys)}",
                remedy='Keep either "inputs" or the named ones.',
            )
        inputs = _as_inputs(content["inputs"], source)
    else:
        inputs = _named_inputs({key: v for key, v in content.items() if str(key).startswith("inputs.")}, source, keys)
    if "targets" in content:
        targets = content["targets"]
    else:
        targets = {str(k)[len("targets.") :]: v for k, v in content.items() if str(k).startswith("targets.")}
        if not targets:
            raise _missing("targets", source, keys)
    return Batch(inputs, _as_tensors(targets), source)


def _named_inputs(named: dict[str, Any], source: str, keys: list[str]) -> Inputs:
    positional: dict[int, Any] = {}
    keyword: dict[str, Any] = {}
    for key, value in named.items():
        name = key[len("inputs.") :]
        if name.isdigit():
            positional[int(name)] = _as_tensors(value)
        else:
            keyword[name] = _as_tensors(value)
    if not positional and not keyword:
        raise _missing("inputs", source, keys)
    if sorted(positional) != list(range(len(positional))):
        raise BatchError(
            f"The positional inputs must be numbered 0, 1, ...; got {sorted(positional)}.",
            where=f"{source}, keys {listed(keys)}",
            remedy="Number them without gaps, or use the model's keywords.",
        )
    return Inputs(tuple(positional[i] for i in range(len(positional))), keyword)


def _missing(what: str, source: str, keys: list[str]) -> BatchError:
    return BatchError(
        f'The batch has no "{what}"; its keys are: {listed(keys) or "none"}.',
        where=source,
        remedy=FILE_FORMS,
    )
