"""From an nn.Module to an exported program: flat tensors in, the output tensor out, example axis dynamic."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from curvscope.errors import BatchError, ModelError, out_of_memory
from curvscope.graph.cells import cell_decompositions
from curvscope.graph.graph_inputs import batch_vector, edge_lists
from curvscope.graph.lookups import rescaling, settle
from curvscope.graph.reading import Replayed, numbers_read
from curvscope.graph.shadow import shadow
from curvscope.graph.widening import Widened
from curvscope.load.problem import Inputs


@dataclass(frozen=True)
class Exported:
    """A model as a functional program.

    Attributes:
        program: takes the tensor inputs in the order of `input_names`, returns one tensor.
        input_names: "0", "1", ... for positional inputs, the keyword for the others.
        example_axes: the example axis of each input, None where it has none.
        dynamic: whether the example axis may change its size.
        notes: what could not be done as wished, one sentence each.
        free: whether the further axes that were asked for may change their sizes, too.
    """

    program: torch.export.ExportedProgram
    input_names: tuple[str, ...]
    example_axes: tuple[int | None, ...]
    dynamic: bool
    notes: tuple[str, ...] = ()
    free: bool = False


class ExportFailure(Exception):
    """torch.export refused the model; the eager fallback takes over. Not meant for users."""


@dataclass(frozen=True)
class FlatInputs:
    """The tensors among a model's arguments, with what is needed to put them back."""

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    leaves: tuple[Any, ...]
    positions: tuple[int, ...]
    spec: Any

    def rebuild(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments with these tensors in place of the original ones."""
        leaves = list(self.leaves)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs


def flatten_inputs(inputs: Inputs) -> FlatInputs:
    """The tensor leaves of the arguments, named by position or keyword (nested ones by path)."""
    paths, spec = pytree.tree_flatten_with_path((tuple(inputs.args), dict(inputs.kwargs)))
    names, tensors, positions = [], [], []
    for index, (path, leaf) in enumerate(paths):
        if isinstance(leaf, Tensor):
            names.append(".".join(_key(key) for key in path[1:]))
            tensors.append(leaf)
            positions.append(index)
    if not tensors:
        raise BatchError(
            "The inputs hold no tensor.",
            where="batch, inputs",
            remedy="Give the model's arguments as a tensor, a tuple of tensors or a dict of keyword tensors.",
        )
    return FlatInputs(tuple(names), tuple(tensors), tuple(leaf for _, leaf in paths), tuple(positions), spec)


def _key(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def example_axes_of(
    names: tuple[str, ...], tensors: tuple[Tensor, ...], chosen: Mapping[str, int], index: str | None = None
) -> tuple[tuple[int | None, ...], int]:
    """The example axis of each input and N.

    Axis 0 of every input whose size there is N, unless `chosen` says otherwise; N is the size of the first chosen
    axis, else that of the first input's axis 0. For graphs no input has an example axis: the batch vector called
    `index` tells the examples, and without it the whole graph is one.

    Raises:
        BatchError: a chosen name or axis does not exist, sizes disagree, or N is 0.
    """
    vector = batch_vector(names, tensors, index)
    if vector is not None and chosen:
        raise BatchError(
            "Both an example axis and a batch vector are named; they are two ways to tell the examples apart.",
            where="example_axes, example_index (--example-axis, --example-index)",
            remedy="For graphs give --example-index alone.",
        )
    if vector is not None:
        return (None,) * len(names), int(vector.max()) + 1
    if not chosen and edge_lists(names, tensors):
        return (None,) * len(names), 1
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        raise BatchError(
            f"There is no input named {unknown[0]!r}; the inputs are {', '.join(names)}.",
            where="example_axes (--example-axis)",
            remedy="Name an input by its keyword or its position (0, 1, ...).",
        )
    count: int | None = None
    for name, tensor in zip(names, tensors, strict=True):
        if name in chosen:
            axis = chosen[name]
            if not -tensor.ndim <= axis < tensor.ndim:
                raise BatchError(
                    f"Input {name!r} has shape {list(tensor.shape)}, so it has no axis {axis}.",
                    where="example_axes (--example-axis)",
                    remedy=f"Choose an axis from 0 to {tensor.ndim - 1}.",
                )
            size = tensor.shape[axis]
            if count is not None and size != count:
                raise BatchError(
                    f"The example axes disagree: input {name!r} has {size} examples there, an earlier one {count}.",
                    where="example_axes (--example-axis)",
                    remedy="Name the axis that holds the examples in every input that has one.",
                )
            count = size
    if count is None:
        count = next((tensor.shape[0] for tensor in tensors if tensor.ndim), 1)
    if count == 0:
        raise BatchError("The batch is empty: 0 examples.", where="batch, inputs", remedy="Give at least one example.")
    axes = tuple(
        chosen[name] % tensor.ndim if name in chosen else (0 if tensor.ndim and tensor.shape[0] == count else None)
        for name, tensor in zip(names, tensors, strict=True)
    )
    return axes, count


def output_tensor(output: Any) -> Tensor:
    """The one tensor the loss is computed from: the output itself, its `logits`, or a tuple's first item.

    Raises:
        ModelError: there is no such tensor, or its numbers are not real ones.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    first = output[0] if isinstance(output, (tuple, list)) and output else None
    found = next((item for item in (output, logits, first) if isinstance(item, Tensor)), None)
    if found is None:
        raise ModelError(
            f"The model returned {type(output).__name__}, in which no output tensor can be told.",
            where="the model's forward pass",
            remedy="Return a tensor, a dict or dataclass with `logits`, or a tuple whose first item is the output.",
        )
    if not found.is_floating_point():
        raise ModelError(
            f"The model's outputs must be real floating-point numbers; got {str(found.dtype).removeprefix('torch.')}.",
            where="the model's forward pass",
            remedy="Return what the loss is computed from: logits rather than decisions, real parts beside imaginary "
            "ones (torch.view_as_real).",
        )
    return found


class _Flat(nn.Module):
    """The model behind flat tensor arguments; shares the model's children, so parameter names stay its own."""

    def __init__(self, model: nn.Module, flat: FlatInputs, widen: torch.dtype | None = None) -> None:
        super().__init__()
        self.__dict__["inner"] = model
        self.__dict__["widen"] = widen
        self.__dict__["flat"] = flat
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = getattr(model, registry)

    def forward(self, *tensors: Tensor) -> Tensor:
        args, kwargs = self.__dict__["flat"].rebuild(tensors)
        widen = self.__dict__["widen"]
        with contextlib.nullcontext() if widen is None else Widened(widen):
            return output_tensor(self.__dict__["inner"](*args, **kwargs))


def export_model(
    model: nn.Module,
    inputs: Inputs,
    example_axes: Mapping[str, int],
    *,
    example_index: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    free_axes: Mapping[str, Collection[int]] | None = None,
    widen: torch.dtype | None = None,
) -> Exported:
    """The model in eval mode as a functional program with a dynamic example axis.

    One example is exported from two copies of it, so that the axis is not specialised away. `free_axes` are further
    axes of inputs whose sizes differ between batches; where they can't be dynamic, the example axis alone is. Where
    that fails, too, a static export is made and said to be. `model` itself is never touched (see `shadow`). Graphs are
    exported at the size they have, and numbers that the model reads off them (how many graphs there are) are fixed.
    The model's own casts to narrower types than `widen` give that one (see `widening`).

    Raises:
        ExportFailure: torch.export refuses the model either way (data-dependent control flow, ...).
        BatchError, ModelError: the inputs name no example axis, or the output holds no tensor.
    """
    flat = flatten_inputs(inputs)
    axes, count = example_axes_of(flat.names, flat.tensors, example_axes, example_index)
    graphs = example_index is not None or (not example_axes and bool(edge_lists(flat.names, flat.tensors)))
    twin = shadow(model, device=device, dtype=dtype)
    tensors = tuple(t.detach().to(device=device, dtype=dtype if t.is_floating_point() else None) for t in flat.tensors)
    if rescaling(twin):
        args, kwargs = flat.rebuild(tensors)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            twin(*args, **kwargs)
        settle(twin)
    traced = tensors
    if count == 1 and not graphs:
        traced = tuple(
            t if axis is None else torch.cat([t, t], dim=axis) for t, axis in zip(tensors, axes, strict=True)
        )
    wrapper: nn.Module = _Flat(
        twin, dataclasses.replace(flat, leaves=tuple(_detached(leaf) for leaf in flat.leaves)), widen
    ).eval()
    if graphs:
        read = numbers_read(lambda: wrapper(*tensors))
        wrapper = Replayed(wrapper, read).eval() if read else wrapper
    dynamic = tuple({} if axis is None else {axis: torch.export.Dim.DYNAMIC} for axis in axes)
    attempts: list[tuple[Any, ...] | None] = [dynamic, None]
    wanted = free_axes or {}
    if wanted:
        every = zip(dynamic, flat.names, strict=True)
        attempts.insert(0, tuple(d | dict.fromkeys(wanted.get(n, ()), torch.export.Dim.DYNAMIC) for d, n in every))
    if graphs:
        attempts = [None]
    failures: list[str] = []
    for number, attempt in enumerate(attempts):
        try:
            with _quiet_export():
                program = torch.export.export(
                    wrapper,
                    tensors if attempt is None else traced,
                    # one *args parameter: its dynamic shapes are a tuple inside a tuple
                    dynamic_shapes=None if attempt is None else (attempt,),
                    strict=False,
                ).run_decompositions(recurrent_decompositions())
        except (BatchError, ModelError):
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            failures.append(_first_line(error))
            continue
        fixed = attempt is None and not graphs
        notes = (f"The batch size is fixed in the graph ({failures[-1]}).",) if fixed else ()
        free = bool(wanted) and number == 0
        return Exported(program, flat.names, axes, attempt is not None, notes, free)
    raise ExportFailure(failures[-1])


def recurrent_decompositions() -> dict[Any, Any]:
    """The only operations decomposed: recurrent layers and cells, into two linear operations a step."""
    from torch._decomp import get_decompositions

    aten = torch.ops.aten
    layers = get_decompositions([aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input])
    return {**layers, **cell_decompositions()}


def _detached(leaf: Any) -> Any:
    return None if isinstance(leaf, Tensor) else leaf


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


@contextlib.contextmanager
def _quiet_export() -> Iterator[None]:
    """Export without its log lines and warnings, without fused attention, and with the random state put back."""
    fused = torch.backends.mha.get_fastpath_enabled()
    threshold = logging.root.manager.disable
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=devices),
        contextlib.redirect_stdout(io.StringIO()),  # torch prints the graph of a refused export, too
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        torch.backends.mha.set_fastpath_enabled(False)
        logging.disable(logging.CRITICAL)  # a refused export logs the whole graph
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            logging.disable(threshold)
