"""Writing a bundle: model, batch, loss, optimizer and step of a running training in one file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvscope.errors import BatchError, ModelError, OutputError, UsageError
from curvscope.graph.export import Exported, ExportFailure, export_model, flatten_inputs
from curvscope.graph.shadow import shadow
from curvscope.graph.trial import try_forward
from curvscope.load.archive import RefusedArchiveError, UnreadableArchiveError
from curvscope.load.batch import load_batch, named_axes
from curvscope.load.bundle import FORMAT, VERSION, holds_bundle
from curvscope.load.eval_mode import eval_mode
from curvscope.load.importing import random_state_kept
from curvscope.load.loss import load_loss
from curvscope.load.optimizer import as_optimizer_state
from curvscope.load.problem import Batch, Inputs, Loss, OptimizerState
from curvscope.load.targets import CLASS_LOSSES, check_targets, class_indices
from curvscope.load.vet import vetted_archive


def capture(
    path: str | os.PathLike[str],
    model: nn.Module,
    batch: Any,
    loss: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    clip_norm: float | None = None,
    step: int | None = None,
    example_axes: Mapping[str, int] | Mapping[int, int] | None = None,
    example_index: str | int | None = None,
) -> None:
    """Write a bundle that `curvscope analyze path` reads anywhere, without the model's code.

    The model is exported in eval mode; it, the optimizer and the random state are left exactly as they are. A
    loss that is a callable is exported too; where that fails, `--loss` must be given when the bundle is
    analyzed. The file appears complete or not at all.

    Args:
        path: where to write; an earlier bundle is replaced, and no other file.
        model: the network being trained.
        batch: `(inputs, targets)`; inputs are a tensor, a tuple or a dict of keyword arguments.
        loss: a name with settings, a torch loss module, or a callable `(outputs, targets) -> scalar`.
        optimizer: the optimizer that trains it, for the stability measures.
        scheduler: its learning rate scheduler: what it will do is judged, too.
        clip_norm: the bound that the training keeps on the gradient's norm (`torch.nn.utils.clip_grad_norm_`).
        step: the training step.
        example_axes: the example axis of an input by name or position, where it is not axis 0.
        example_index: for a batch of graphs, the input (by name or position) that holds the number of its graph for
            every node; without it a graph is one example.

    Raises:
        ModelError: torch.export can't express the model.
        BatchError, LossError: the batch or the loss does not suit the model.
        UsageError: the optimizer does not train this model, or holds what a bundle can't; a scheduler or a bound
            without an optimizer, or of the wrong kind.
        OutputError: the file can't be written, or one that is no bundle has that name.
    """
    target = Path(os.path.realpath(path))
    _check_target(target)
    chosen = load_loss(loss)
    loaded = load_batch(batch)
    if chosen.name in CLASS_LOSSES:
        loaded = dataclasses.replace(loaded, targets=class_indices(loaded.targets))
    with random_state_kept():
        _try(model, loaded.inputs)
        index = None if example_index is None else str(example_index)
        exported = _export(model, loaded.inputs, named_axes(example_axes), index)
        outputs = _outputs(exported, loaded.inputs)
        check_targets(chosen, outputs, loaded.targets)
        loss_graph = _loss_graph(chosen, outputs, loaded.targets) if chosen.name == "callable" else None
    state = as_optimizer_state(optimizer, model, scheduler=scheduler, clip_norm=clip_norm)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "graph": _as_tensor(_archive(exported.program)),
        "batch": _batch_content(loaded),
        "example_axes": dict(zip(exported.input_names, exported.example_axes, strict=True)),
        "loss": {
            "name": chosen.name,
            "settings": {"label": chosen.label}
            if chosen.name == "callable"
            else _plain(dict(chosen.settings), "loss settings"),
        },
        "loss_graph": None if loss_graph is None else _as_tensor(loss_graph),
        "optimizer": None if state is None else _optimizer_content(state, scheduler),
        "step": step,
        "mode": eval_mode(model),
        "model": type(model).__name__,
        "torch": str(torch.__version__),
    }
    if index is not None:
        content["example_index"] = index
    _write(target, content)


def _check_target(path: Path) -> None:
    """Refuse a missing folder, and what has that name and is no bundle (an empty file may go)."""
    if not path.parent.is_dir():
        raise OutputError(
            "The bundle can't be written: its folder does not exist.",
            where=str(path.parent),
            remedy="Create the folder, or give another path.",
        )
    if not path.exists():
        return
    try:
        if path.is_file() and (path.stat().st_size == 0 or holds_bundle(path)):
            return
        found = "a folder" if path.is_dir() else "a file that is no bundle" if path.is_file() else "a device or pipe"
    except OSError as cause:
        found = f"a file that can't be looked at ({cause.strerror or cause})"
    raise OutputError(
        f"The bundle can't be written: {found} has that name, and is kept.",
        where=str(path),
        remedy="Give another path, or delete it yourself; capture replaces earlier bundles only.",
    )


def _try(model: nn.Module, inputs: Inputs) -> None:
    """Refuse a batch on which the model, as it is, raises."""
    flat = flatten_inputs(inputs)
    try_forward(shadow(model), flat, flat.tensors)


def _export(model: nn.Module, inputs: Inputs, example_axes: Mapping[str, int], index: str | None) -> Exported:
    try:
        return export_model(model, inputs, example_axes, example_index=index)
    except ExportFailure as cause:
        raise ModelError(
            f"torch.export can't express this model as a graph: {cause}.",
            where=f"model {type(model).__name__}",
            remedy="Save model.state_dict() instead, and analyze it with --model package.module:factory.",
        ) from cause


def _outputs(exported: Exported, inputs: Inputs) -> Tensor:
    from torch.utils._pytree import tree_leaves

    tensors = [t for t in tree_leaves((tuple(inputs.args), dict(inputs.kwargs))) if isinstance(t, Tensor)]
    with torch.no_grad():
        return exported.program.module(check_guards=False)(*tensors)


def _archive(program: torch.export.ExportedProgram) -> bytes:
    """The program as a torch.export archive without any pickle, source path or traceback in it."""
    program._example_inputs = None  # else they are stored, as a pickle
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about weights that are views
        torch.export.save(program, buffer)
    try:
        return vetted_archive(buffer.getvalue(), surplus=True)
    except (RefusedArchiveError, UnreadableArchiveError) as cause:
        raise ModelError(
            f"The model's graph can't be put in a bundle: {cause}.",
            where="torch.export archive",
            remedy="Save model.state_dict() instead, and analyze it with --model package.module:factory.",
        ) from cause


class _LossGraph(nn.Module):
    """A callable loss as a module, so that it can be exported."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        # a loss module's own weights must be found by the export
        if isinstance(loss.function, nn.Module):
            self.loss: Any = loss.function
        else:
            self.__dict__["loss"] = loss.function

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs, targets)


def _loss_graph(loss: Loss, outputs: Tensor, targets: Any) -> bytes | None:
    """The loss as an archive, or None where it can't be exported or its export gives another value."""
    if not isinstance(targets, Tensor):
        return None
    try:
        exported = export_model(_LossGraph(loss), Inputs((outputs.detach(), targets)), {})
        graph = exported.program.module(check_guards=False)
        with torch.no_grad():
            if not torch.allclose(graph(outputs, targets), loss(outputs, targets)):
                return None
        return _archive(exported.program)
    except (ExportFailure, ModelError, BatchError):
        return None


def _batch_content(batch: Batch) -> dict[str, Any]:
    inputs = {
        "args": _plain(tuple(batch.inputs.args), "inputs"),
        "kwargs": _plain(dict(batch.inputs.kwargs), "inputs"),
    }
    return {"inputs": inputs, "targets": _plain(batch.targets, "targets")}


def _optimizer_content(state: OptimizerState, scheduler: Any) -> dict[str, Any]:
    content: dict[str, Any] = {} if state.clip is None else {"clip_norm": state.clip}
    if scheduler is not None:
        content["scheduler"] = {"class": type(scheduler).__name__, "state_dict": _plain_parts(scheduler.state_dict())}
    return {
        **content,
        "class": state.class_name,
        "param_names": list(state.param_names),
        "state_dict": _plain(state.state_dict, "optimizer"),
    }


def _plain(value: Any, where: str) -> Any:
    """The value made of tensors on the CPU and plain containers, sharing no storage with the original."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)  # a subclass would be stored by its name
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, int) else str(key): _plain(item, f"{where}.{key}") for key, item in value.items()
        }
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    raise UsageError(
        f"A bundle holds tensors, numbers, strings and plain containers; here is a {type(value).__name__}.",
        where=where,
        remedy="Give plain tensors in the batch; leave the optimizer out if its state holds other objects.",
    )


def _plain_parts(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a scheduler's state a bundle can hold; functions of the user's own are left out."""
    found = {}
    for key, value in state.items():
        with contextlib.suppress(UsageError):
            found[str(key)] = _plain(value, f"scheduler.{key}")
    return found


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside the target, then rename: a reader sees the old file or the new one."""
    _check_target(path)
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as cause:
        raise OutputError(
            f"The bundle can't be written: {cause.strerror or cause}.",
            where=str(path),
            remedy="Choose a folder that exists and that you may write to.",
        ) from cause
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
