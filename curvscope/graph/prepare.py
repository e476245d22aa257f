"""From a problem to the graph that all passes run, and the batch sizes that this graph takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvscope.errors import BatchError, CurvscopeError
from curvscope.graph.eager import build_eager
from curvscope.graph.export import ExportFailure, FlatInputs, example_axes_of, export_model, flatten_inputs
from curvscope.graph.functional import Graph, build
from curvscope.graph.graph_inputs import edge_lists
from curvscope.graph.lookups import lookup_notes, rescaling, settle
from curvscope.graph.shadow import moved, shadow
from curvscope.graph.trial import check_sizes, try_forward
from curvscope.graph.widening import Widened, casts_in, own_casts
from curvscope.load.problem import Problem
from curvscope.settings import Settings


@dataclass(frozen=True)
class Prepared:
    """The graph with what is known of its inputs.

    Attributes:
        graph: the functional graph, or the eager fallback.
        flat: the first batch's inputs, flat.
        axes: the example axis of every input tensor, None where it has none.
        examples: N of the first batch.
        any_size: whether other numbers of examples run through the graph.
        any_shape: whether other sizes along the further axes that differ between batches do.
        index: the input that holds the graph of every node, for batches of graphs.
        notes: what could not be done as wished.
    """

    graph: Graph
    flat: FlatInputs
    axes: tuple[int | None, ...]
    examples: int
    any_size: bool
    any_shape: bool
    notes: tuple[str, ...]
    index: str | None = None


def prepare(
    problem: Problem,
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    free_axes: Mapping[str, Collection[int]] | None = None,
) -> Prepared:
    """The functional graph of a problem's model in `dtype` on `device`, or the eager fallback where export refuses it.

    `free_axes` are axes beside the example axis whose sizes differ between batches, by input.

    Raises:
        BatchError: the model refuses the batch.
        ModelError: it has no linear layer, or none is left.
    """
    flat = flatten_inputs(problem.inputs)
    index = problem.example_index
    axes, examples = example_axes_of(flat.names, flat.tensors, problem.example_axes, index)
    check_sizes(flat, dtype)
    options: dict[str, Any] = {"layers": settings.layers, "skip": settings.skip}
    notes = _precision_notes(problem, dtype) + lookup_notes(problem.model) + _whole_graph_notes(flat, axes, index)
    if not isinstance(problem.model, nn.Module):
        dynamic = bool(problem.model.range_constraints)
        graph = build(problem.model, device=device, dtype=dtype, dynamic=dynamic, **options)
        notes += _cast_notes(casts_in(problem.model.graph), problem, dtype)
        return Prepared(graph, flat, axes, examples, dynamic and index is None, False, notes, index)
    twin = shadow(problem.model, device=device, dtype=dtype)
    tensors = tuple(moved(tensor, device, dtype) for tensor in flat.tensors)
    widen = _tried(twin, flat, tensors, dtype)
    model = problem.model
    if rescaling(twin):
        for batch in problem.batches or ():
            other = flatten_inputs(batch.inputs)
            try_forward(twin, other, tuple(moved(tensor, device, dtype) for tensor in other.tensors))
        settle(twin)
        model = twin
    try:
        exported = export_model(
            model,
            problem.inputs,
            problem.example_axes,
            example_index=index,
            device=device,
            dtype=dtype,
            free_axes=free_axes,
            widen=None if widen is None else dtype,
        )
    except ExportFailure as failure:
        if widen is not None:
            raise own_casts(widen.refusal, dtype) from failure
        graph = build_eager(twin, flat, tensors, str(failure), **options)
        told = f"torch.export refused the model, so only its own linear modules are seen: {failure}"
        return Prepared(graph, flat, axes, examples, index is None, index is None, (*notes, told), index)
    graph = build(exported.program, device=device, dtype=dtype, dynamic=exported.dynamic, **options)
    casts = casts_in(exported.program.graph) if widen is None else widen.kinds
    notes += _cast_notes(casts, problem, dtype)
    return Prepared(graph, flat, axes, examples, exported.dynamic, exported.free, (*notes, *exported.notes), index)


@dataclass(frozen=True)
class _Casting:
    """What a forward pass raised for its own casts, and the types that it casts to."""

    refusal: BatchError
    kinds: frozenset[torch.dtype]


def _tried(twin: nn.Module, flat: FlatInputs, tensors: tuple[Tensor, ...], dtype: torch.dtype) -> _Casting | None:
    """Tries a forward pass: None where it runs; its casts where it runs once these are widened only.

    Raises:
        BatchError, ModelError: as `try_forward`.
    """
    try:
        try_forward(twin, flat, tensors)
    except BatchError as refusal:
        try:
            with Widened(dtype) as mode:
                try_forward(twin, flat, tensors)
        except CurvscopeError:
            raise refusal from refusal.__cause__
        return _Casting(refusal, frozenset(mode.kinds))
    return None


def source_dtype(problem: Problem, dtype: torch.dtype) -> str:
    """The dtypes that the weights are stored in, by name; empty where all are `dtype`."""
    kinds = {p.dtype for p in problem.model.parameters() if p.is_floating_point()}
    return ", ".join(sorted(_name(kind) for kind in kinds)) if kinds - {dtype} else ""


def _precision_notes(problem: Problem, dtype: torch.dtype) -> tuple[str, ...]:
    """Says so where the checkpoint's own precision is lower than the run's in training, or higher than the run's."""
    kinds = {p.dtype for p in problem.model.parameters() if p.is_floating_point()}
    notes = []
    low = sorted(_name(kind) for kind in kinds if torch.finfo(kind).bits < 32)
    if low:
        stored = ", ".join(low)
        notes.append(
            f"Weights stored as {stored} are computed in {_name(dtype)}; what training in {stored} rounds is not in "
            "these numbers."
        )
    wide = sorted(_name(kind) for kind in kinds if torch.finfo(kind).bits > torch.finfo(dtype).bits)
    if wide:
        notes.append(f"Weights stored as {', '.join(wide)} are rounded to {_name(dtype)}; --dtype float64 keeps them.")
    return tuple(notes)


def _cast_notes(kinds: Collection[torch.dtype], problem: Problem, dtype: torch.dtype) -> tuple[str, ...]:
    """Says so where the forward pass itself (or autocast) casts to types that round the checkpoint's own."""
    own = {p.dtype for p in problem.model.parameters() if p.is_floating_point()}
    rounding = sorted(_name(kind) for kind in kinds if any(torch.promote_types(kind, one) != kind for one in own))
    if not rounding:
        return ()
    return (
        f"The forward pass casts to {', '.join(rounding)}; here all of it is computed in {_name(dtype)}, and what such "
        "casts round is not in these numbers.",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _whole_graph_notes(flat: FlatInputs, axes: Sequence[int | None], example_index: str | None) -> tuple[str, ...]:
    """Says so where a graph was taken for one example."""
    edges = ", ".join(flat.names[position] for position in edge_lists(flat.names, flat.tensors))
    if example_index is not None or not edges or any(axis is not None for axis in axes):
        return ()
    return (
        f"The inputs are a graph (edges in input {edges}), and the whole of it is one example. In a batch of graphs "
        "--example-index names the input that holds the graph of every node.",
    )


def varying_axes(problem: Problem) -> dict[str, set[int]]:
    """Beside the examples, the axes along which the inputs of several batches have different sizes, by input.

    Raises:
        BatchError: a batch can't be read or used.
    """
    first = flatten_inputs(problem.inputs)
    axes, _ = example_axes_of(first.names, first.tensors, problem.example_axes, problem.example_index)
    found: dict[str, set[int]] = {}
    for batch in problem.batches or ():
        flat = flatten_inputs(batch.inputs)
        if flat.names != first.names:
            continue
        for name, tensor, known, axis in zip(first.names, flat.tensors, first.tensors, axes, strict=True):
            sizes = enumerate(zip(tensor.shape, known.shape, strict=False))
            differing = {i for i, (size, other) in sizes if i != axis and size != other}
            if differing and tensor.ndim == known.ndim:
                found.setdefault(name, set()).update(differing)
    return found
