"""The bundle that `curvscope.capture` writes: graph, batch, loss, optimizer and step in one file.

A bundle is `torch.save` of tensors and plain containers, so reading it runs nothing:

    format, version   "curvscope-bundle", 1
    graph             uint8 tensor: a torch.export archive; flat tensors in, the output tensor out
    batch             {"inputs": {"args", "kwargs"}, "targets"}
    example_axes      input name to example axis (None: it has none), in the graph's order
    example_index     for batches of graphs: the name of the input that holds the graph of every node
    loss              {"name", "settings"}
    loss_graph        where the loss is a callable that can be exported: (outputs, targets) in, the loss out
    optimizer         {"class", "param_names", "state_dict"}, or None; where they are known with "clip_norm" (the bound
                      on the gradient's norm) and "scheduler": {"class", "state_dict"}
    step              int or None
    model, torch      the model's class name and the torch that wrote the graph, for reports and messages
    mode              {"batch_norm", "batch_statistics", "dropout"}: what eval mode hides, as the graph no longer tells
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from curvscope.errors import BatchError, CheckpointError, LossError
from curvscope.load.archive import RefusedArchiveError, UnreadableArchiveError
from curvscope.load.importing import describe, listed
from curvscope.load.loss import callable_loss, named_loss
from curvscope.load.problem import Batch, Inputs, Loss, OptimizerState
from curvscope.load.schedule import schedule
from curvscope.load.vet import raw_weights, vetted_archive

FORMAT = "curvscope-bundle"
VERSION = 1
REQUIRED: Mapping[str, type | tuple[type, ...]] = {
    "graph": Tensor,
    "batch": Mapping,
    "example_axes": Mapping,
    "loss": Mapping,
    "optimizer": (Mapping, type(None)),
    "step": (int, type(None)),
}
AGAIN = "Write it again with curvscope.capture(path, model, batch, loss=...)."


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds, its form checked; graphs are still bytes."""

    graph: bytes
    inputs: Inputs
    targets: Any
    axes: Mapping[str, int | None]
    loss_name: str
    loss_settings: Mapping[str, Any]
    loss_graph: bytes | None
    optimizer: OptimizerState | None
    step: int | None
    model_name: str
    torch_version: str
    where: str
    mode: Mapping[str, bool] | None = None
    index: str | None = None

    def program(self) -> torch.export.ExportedProgram:
        """The model's graph, vetted before torch reads it.

        Raises:
            CheckpointError: the graph could run code, is damaged, or was written for another torch.
        """
        return load_graph(self.graph, f"{self.where}, graph", self.torch_version)

    def weights(self) -> dict[str, Tensor]:
        """The weights alone, whatever torch wrote the graph.

        Raises:
            CheckpointError: they are stored as pickles, or damaged.
        """
        try:
            return raw_weights(self.graph)
        except (RefusedArchiveError, UnreadableArchiveError) as cause:
            raise CheckpointError(
                f"The bundle's weights can't be read: {cause}.", where=f"{self.where}, graph", remedy=AGAIN
            ) from cause

    def loss(self) -> Loss | None:
        """The loss, or None where it was a callable that no graph holds.

        Raises:
            CheckpointError: its name or settings are unknown, or its graph is refused.
        """
        if self.loss_name == "callable":
            if self.loss_graph is None:
                return None
            program = load_graph(self.loss_graph, f"{self.where}, loss_graph", self.torch_version)
            return callable_loss(program.module(check_guards=False), str(self.loss_settings.get("label", "callable")))
        try:
            return named_loss(self.loss_name, self.loss_settings)
        except LossError as cause:
            raise CheckpointError(
                f"The bundle's loss is unknown here: {cause.what}", where=f"{self.where}, loss", remedy=AGAIN
            ) from cause
        except (TypeError, ValueError, RuntimeError) as cause:
            raise CheckpointError(
                f"The bundle's loss has settings of the wrong kind: {describe(cause)}.",
                where=f"{self.where}, loss settings {', '.join(map(str, self.loss_settings))}",
                remedy=AGAIN,
            ) from cause

    def graph_inputs(self, inputs: Inputs | None = None) -> Inputs:
        """The tensors of these inputs (the bundle's own if None) as the graph takes them: flat, in its order.

        Raises:
            BatchError: they do not match the graph's input names.
        """
        names = list(self.axes)
        tensors = [leaf for leaf in tree_leaves(_plain(inputs or self.inputs)) if isinstance(leaf, Tensor)]
        if inputs is not None and inputs.kwargs and not inputs.args and all(n in inputs.kwargs for n in names):
            tensors = [inputs.kwargs[name] for name in names]
        if len(tensors) != len(names):
            raise BatchError(
                f"The bundle's graph takes {len(names)} tensors ({listed(names)}); the batch has {len(tensors)}.",
                where=self.where,
                remedy="Give the same inputs as when the bundle was captured.",
            )
        return Inputs(tuple(tensors))


def holds_bundle(path: Path) -> bool:
    """Whether the file is a bundle, of any version of torch; nothing in it is run, and its tensors are not read.

    Raises:
        OSError: it can't be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(FORMAT.encode() in archive.read(name) for name in pickles)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError):
        return False


def is_bundle(content: Any) -> bool:
    """Whether what a file holds says that it is a bundle."""
    return isinstance(content, Mapping) and content.get("format") == FORMAT


def parse_bundle(content: Mapping[str, Any], where: str) -> Bundle:
    """The bundle in what a file holds, with its form checked.

    Raises:
        CheckpointError: another version, or a part that is missing or of another type.
    """
    version = content.get("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        raise CheckpointError(
            f"The bundle has version {version!r}; this curvscope reads version {VERSION}.",
            where=where,
            remedy="Update curvscope." if newer else AGAIN,
        )
    for key, kind in REQUIRED.items():
        if key not in content:
            raise CheckpointError(f"The bundle has no {key!r}.", where=where, remedy=AGAIN)
        _require(content[key], kind, key, where)
    for name, axis in content["example_axes"].items():
        _require(axis, (int, type(None)), f"example_axes {name!r}", where)
    _require(content.get("example_index"), (str, type(None)), "example_index", where)
    batch, loss, optimizer = content["batch"], content["loss"], content["optimizer"]
    inputs = _part(batch, "inputs", Mapping, "batch", where)
    if "targets" not in batch:
        raise CheckpointError("The bundle's batch has no 'targets'.", where=where, remedy=AGAIN)
    args = _part(inputs, "args", (tuple, list), "batch inputs", where)
    kwargs = _part(inputs, "kwargs", Mapping, "batch inputs", where)
    loss_graph = content.get("loss_graph")
    return Bundle(
        graph=_bytes(content["graph"], "graph", where),
        inputs=Inputs(tuple(args), dict(kwargs)),
        targets=batch["targets"],
        axes={str(name): axis for name, axis in content["example_axes"].items()},
        loss_name=_part(loss, "name", str, "loss", where),
        loss_settings=_part(loss, "settings", Mapping, "loss", where),
        loss_graph=None if loss_graph is None else _bytes(loss_graph, "loss_graph", where),
        optimizer=None if optimizer is None else _optimizer(optimizer, where),
        step=content["step"],
        model_name=str(content.get("model", "model")),
        torch_version=str(content.get("torch", "unknown")),
        where=where,
        mode=_mode(content.get("mode"), where),
        index=content.get("example_index"),
    )


def _optimizer(content: Mapping[str, Any], where: str) -> OptimizerState:
    """The optimizer with its clipping and its schedule."""
    name = _part(content, "class", str, "optimizer", where)
    order = _part(content, "param_names", (list, tuple), "optimizer", where)
    state_dict = _part(content, "state_dict", Mapping, "optimizer", where)
    clip, scheduler = content.get("clip_norm"), content.get("scheduler")
    _require(clip, (int, float, type(None)), "optimizer clip_norm", where)
    ahead = None
    if scheduler is not None:
        _require(scheduler, Mapping, "optimizer scheduler", where)
        stored = _part(scheduler, "state_dict", Mapping, "scheduler", where)
        groups = _part(state_dict, "param_groups", (list, tuple), "optimizer", where)
        ahead = schedule(stored, groups, _part(scheduler, "class", str, "scheduler", where))
    return OptimizerState(name, tuple(order), state_dict, clip=None if clip is None else float(clip), schedule=ahead)


def bundle_batch(bundle: Bundle) -> Batch:
    """The bundle's own batch, its arguments as the model takes them."""
    return Batch(bundle.inputs, bundle.targets, f"{bundle.where}, batch")


def load_graph(data: bytes, where: str, torch_version: str = "unknown") -> torch.export.ExportedProgram:
    """A torch.export archive as a program, vetted before torch reads it.

    Raises:
        CheckpointError: it could run code (which part is named), is damaged, or is for another torch.
    """
    try:
        clean = vetted_archive(data)
    except RefusedArchiveError as cause:
        raise CheckpointError(
            f"The graph is refused because it could run code: {cause}.",
            where=where,
            remedy="Do not open this file unless you know who made it. If you made it, capture it again, or "
            "give the "
            "model itself with --model package.module:factory.",
        ) from cause
    except UnreadableArchiveError as cause:
        raise CheckpointError(
            f"The graph can't be read: {cause}.",
            where=where,
            remedy=f"{AGAIN} Or give --model package.module:factory: the weights are read without the graph.",
        ) from cause
    try:
        with _quiet():
            return torch.export.load(io.BytesIO(clean))
    except Exception as cause:
        raise CheckpointError(
            f"torch {torch.__version__} can't read the graph, which torch {torch_version} wrote ({describe(cause)}).",
            where=where,
            remedy="Give --model package.module:factory: the weights are read without the graph. Or use the "
            "torch "
            "that wrote it.",
        ) from cause


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch logs the traceback of a failure that is reported by its exception as well."""
    logger = logging.getLogger("torch.export")
    disabled = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled


def _plain(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(inputs.args), dict(inputs.kwargs)


def _part(owner: Mapping[str, Any], key: str, kind: type | tuple[type, ...], title: str, where: str) -> Any:
    if key not in owner:
        raise CheckpointError(f"The bundle's {title} has no {key!r}.", where=where, remedy=AGAIN)
    _require(owner[key], kind, f"{title} {key}", where)
    return owner[key]


def _mode(value: Any, where: str) -> Mapping[str, bool] | None:
    """What eval mode hides; None where the bundle does not tell."""
    if value is None:
        return None
    _require(value, Mapping, "mode", where)
    return {str(key): bool(item) for key, item in value.items() if isinstance(item, bool)}


def _require(value: Any, kind: type | tuple[type, ...], title: str, where: str) -> None:
    if not isinstance(value, kind):
        raise CheckpointError(
            f"The bundle's {title} is a {type(value).__name__}, which it should not be.",
            where=where,
            remedy=AGAIN,
        )


def _bytes(value: Any, title: str, where: str) -> bytes:
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.ndim != 1:
        raise CheckpointError(f"The bundle's {title} is no tensor of bytes.", where=where, remedy=AGAIN)
    return value.numpy().tobytes()
