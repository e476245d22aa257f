"""A checkpoint on disk, told apart by its content, as a model with whatever else it holds."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvscope.errors import CheckpointError
from curvscope.load.bundle import Bundle, is_bundle, parse_bundle
from curvscope.load.huggingface import load_folder
from curvscope.load.importing import describe
from curvscope.load.optimizer import find_optimizer_state, find_step, match_optimizer
from curvscope.load.pickled import damaged, load_pickled
from curvscope.load.problem import OptimizerState
from curvscope.load.sniff import Kind, sniff
from curvscope.load.state_dict import (
    LIST_LIMIT,
    Factory,
    build_model,
    find_weights,
    load_weights,
    sharded_error,
    summary,
    unwrap,
)
from curvscope.load.surroundings import with_surroundings
from curvscope.load.trainer import trainer_state, with_trainer

FORMATS = (
    "A checkpoint is a curvscope bundle, a state_dict or a pickled nn.Module written by torch.save, a "
    ".safetensors file, "
    "a torch.export archive, or a Hugging Face folder."
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: the model, and the rest where it has it.

    `bundle` is set for a bundle; its graph is then `model`, unless a factory made one.
    """

    model: nn.Module | torch.export.ExportedProgram
    name: str
    optimizer: OptimizerState | None = None
    step: int | None = None
    notes: tuple[str, ...] = ()
    bundle: Bundle | None = field(default=None, repr=False)


def load_checkpoint(path: Path, factory: Factory | None = None, *, trust: bool = False) -> Checkpoint:
    """The checkpoint at `path`.

    A `factory` ("package.module:name" or a callable) makes the model of a state_dict, of a safetensors file,
    and of a bundle whose graph this torch can't read. Nothing that can run code is read without `trust`. The
    weights keep the dtype they were stored in.

    Raises:
        CheckpointError: no such file, an unknown or damaged one, one that is not trusted, or one that does
            not fit the factory's model.
    """
    kind = kind_of(path)
    if kind == "folder":
        return _from_folder(path, factory, trust)
    if kind == "export":
        return _from_export_archive(path, trust)
    if kind == "safetensors":
        return _from_weights(_read_safetensors(path), factory, path)
    content = load_pickled(path, trust=trust)
    if is_bundle(content):
        return _from_bundle(parse_bundle(content, str(path)), factory, path)
    return _from_content(content, factory, path)


def kind_of(path: Path) -> str:
    """The format of a checkpoint by its content: folder, export, safetensors or torch.

    Raises:
        CheckpointError: it is none of these; the message says what it is, and what to do.
    """
    where = str(path)
    if path.is_dir():
        return _kind_of_folder(path)
    if not path.exists():
        raise CheckpointError("There is no such file.", where=where, remedy="Check the path.")
    try:
        kind, head = sniff(path)
    except OSError as cause:
        raise CheckpointError(
            f"The file can't be opened: {cause.strerror}.", where=where, remedy="Check its permissions."
        ) from cause
    if kind == "empty":
        raise CheckpointError("The file is empty (0 bytes).", where=where, remedy="Save or copy it again.")
    if path.suffix == ".distcp" or (path.parent / ".metadata").is_file():
        raise sharded_error(where)
    if kind == "zip":
        return _kind_of_zip(path)
    if kind in ("torch", "safetensors"):
        return kind
    raise _unknown(kind, head, where)


def _kind_of_folder(path: Path) -> str:
    if not (path / "config.json").is_file():
        pieces = [*path.glob("*.distcp"), *path.glob("zero_to_fp32.py"), *path.glob("*_zero_pp_rank_*")]
        if (path / ".metadata").is_file() or pieces:
            raise sharded_error(str(path))
        raise CheckpointError(
            "This is a folder without a config.json, so it is no Hugging Face model.",
            where=str(path),
            remedy=f"Give the checkpoint file itself. {FORMATS}",
        )
    return "folder"


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError, EOFError) as cause:
        raise CheckpointError(
            f"The file is damaged or incomplete: it begins like a checkpoint and has no end ({describe(cause)}).",
            where=str(path),
            remedy="Copy or save it again, and compare the file sizes.",
        ) from cause
    if "archive_format" in names or "serialized_exported_program.json" in names:
        return "export"
    if "constants.pkl" in names:
        raise CheckpointError(
            "This is a TorchScript archive; its layers can't be taken apart.",
            where=str(path),
            remedy='Save its weights: torch.save(torch.jit.load(path).state_dict(), "weights.pt"), then '
            "analyze "
            "weights.pt with --model package.module:factory.",
        )
    if "data.pkl" in names:
        return "torch"
    if any(name.endswith(".npy") for name in names):
        raise CheckpointError(
            "This is a NumPy archive, not a checkpoint.",
            where=str(path),
            remedy=f"If it is the batch, give it with --batch. {FORMATS}",
        )
    raise CheckpointError("This zip file is no checkpoint.", where=str(path), remedy=FORMATS)


def _unknown(kind: Kind, head: bytes, where: str) -> CheckpointError:
    beginning = head[:40].decode(errors="replace")
    what, remedy = {
        "hdf5": (
            "This is an HDF5 file, not a checkpoint.",
            f"A finished analysis is shown by: curvscope show {where}. A batch goes to --batch.",
        ),
        "pickle": (
            "This is a pickle that torch.save did not write.",
            "Read it where it was made, and save model.state_dict() with torch.save.",
        ),
        "lfs": ("This is a Git LFS pointer; the file itself was never fetched.", "Run: git lfs pull"),
        "text": (
            f"This is a text file, not a checkpoint; it begins {beginning!r}.",
            FORMATS,
        ),
    }.get(kind, ("This file is of no known format.", FORMATS))
    return CheckpointError(what, where=where, remedy=remedy)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except Exception as cause:
        raise damaged(path, cause) from cause


def _from_folder(path: Path, factory: Factory | None, trust: bool) -> Checkpoint:
    model = load_folder(path, trust=trust)
    notes: tuple[str, ...] = ()
    if factory is not None:
        built = build_model(factory)
        notes = load_weights(built, model.state_dict(), str(path))
        model = built
    state, step, trainer_notes = trainer_state(path, trust=trust)
    optimizer, optimizer_notes = match_optimizer(state, list(model.named_parameters()))
    optimizer = with_trainer(optimizer, path, trust=trust)
    return Checkpoint(model, type(model).__name__, optimizer, step, (*notes, *trainer_notes, *optimizer_notes))


def _from_export_archive(path: Path, trust: bool) -> Checkpoint:
    if not trust:
        raise CheckpointError(
            "This is a torch.export archive; torch may run code when it reads one.",
            where=str(path),
            remedy="If you made it yourself or trust who did, add --trust; or write a bundle with curvscope.capture.",
        )
    try:
        with path.open("rb") as file:
            program = torch.export.load(file)
    except Exception as cause:
        raise damaged(path, cause) from cause
    return Checkpoint(program, path.stem)


def _from_bundle(bundle: Bundle, factory: Factory | None, path: Path) -> Checkpoint:
    if factory is None:
        return Checkpoint(bundle.program(), bundle.model_name, bundle.optimizer, bundle.step, (), bundle)
    model = build_model(factory)
    notes = load_weights(model, bundle.weights(), str(path))
    return Checkpoint(model, type(model).__name__, bundle.optimizer, bundle.step, notes, bundle)


def _from_content(content: Any, factory: Factory | None, path: Path) -> Checkpoint:
    weights, key = find_weights(content, str(path))
    rest = content if key else {}
    if not isinstance(weights, nn.Module):
        return _from_weights(weights, factory, path, rest)
    model, notes = unwrap(weights)
    if factory is not None:
        return _from_weights(model.state_dict(), factory, path, rest)
    optimizer, optimizer_notes = match_optimizer(find_optimizer_state(rest), list(model.named_parameters()))
    optimizer = with_surroundings(optimizer, rest)
    return Checkpoint(model, type(model).__name__, optimizer, find_step(rest), (*notes, *optimizer_notes))


def _from_weights(
    weights: Mapping[str, Any], factory: Factory | None, path: Path, rest: Mapping[Any, Any] | None = None
) -> Checkpoint:
    if factory is None:
        raise CheckpointError(
            f"The file holds weights ({sum(1 for t in weights.values() if isinstance(t, torch.Tensor))} "
            "tensors) but not "
            f"the model: {summary(weights, LIST_LIMIT)}.",
            where=str(path),
            remedy=f"Name what builds the model: curvscope analyze {path} --model package.module:factory "
            "--batch FILE --loss cross_entropy",
        )
    model = build_model(factory)
    notes = load_weights(model, weights, str(path))
    rest = rest or {}
    optimizer, optimizer_notes = match_optimizer(find_optimizer_state(rest), list(model.named_parameters()))
    optimizer = with_surroundings(optimizer, rest)
    return Checkpoint(model, type(model).__name__, optimizer, find_step(rest), (*notes, *optimizer_notes))
