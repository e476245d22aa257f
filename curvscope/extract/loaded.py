"""One batch as the graph takes it: flat, on the device, and built like the first one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvscope.errors import BatchError
from curvscope.graph.export import FlatInputs, flatten_inputs
from curvscope.graph.functional import Graph
from curvscope.graph.graph_inputs import batch_vector, edge_lists, owners
from curvscope.graph.ownership import verify_graphs
from curvscope.graph.prepare import Prepared
from curvscope.graph.shadow import moved
from curvscope.graph.verify import Layouts, verify
from curvscope.load.problem import Batch


@dataclass(frozen=True)
class Loaded:
    """One batch, flat and on the device."""

    name: str
    flat: FlatInputs
    tensors: list[Tensor]
    axes: tuple[int | None, ...]
    examples: int
    targets: Any


@dataclass(frozen=True)
class Loader:
    """Puts batches on the device, in the run's dtype."""

    prepared: Prepared
    device: torch.device
    dtype: torch.dtype

    def load(self, batch: Batch) -> Loaded:
        """The batch as the graph takes it.

        Raises:
            BatchError: it has other inputs than the first one.
        """
        flat = flatten_inputs(batch.inputs)
        first = self.prepared.flat
        same = flat.names == first.names and flat.spec == first.spec
        same = same and all(_alike(a, b) for a, b in zip(flat.leaves, first.leaves, strict=True))
        if not same:
            raise BatchError(
                f"Its inputs are not built like those of the first batch: {_described(flat)}, where the first has "
                f"{_described(first)}.",
                where=batch.source,
                remedy="Give batches with the same arguments, dtypes and numbers of axes throughout.",
            )
        axes = self.prepared.axes
        counts = {t.shape[axis] for t, axis in zip(flat.tensors, axes, strict=True) if axis is not None} or {1}
        if len(counts) != 1:
            raise BatchError(
                f"The numbers of examples disagree: {_described(flat)}.",
                where=batch.source,
                remedy="Give every input of a batch the same number of examples; name their axis with --example-axis "
                "where it is not the first.",
            )
        (examples,) = counts
        if self.prepared.index is not None:
            examples = self.prepared.examples
        fixed = None
        if not self.prepared.any_size and examples != self.prepared.examples:
            fixed = "a fixed number of examples"
        if not self.prepared.any_shape and sizes(flat, axes) != sizes(first, self.prepared.axes):
            fixed = "inputs of one shape (beside the examples)"
        if fixed is not None:
            raise BatchError(
                f"The model's graph takes {fixed}: the first batch has {_described(first)}, this one "
                f"{_described(flat)}.",
                where=batch.source,
                remedy="Give batches of equal shapes (pad the sequences to one length), or analyze them one by one.",
            )
        tensors = [moved(tensor, self.device, self.dtype) for tensor in flat.tensors]
        targets = moved(batch.targets, self.device, self.dtype)
        return Loaded(batch.source, flat, tensors, axes, examples, targets)


def sizes(flat: FlatInputs, axes: Sequence[int | None]) -> tuple[tuple[int, ...], ...]:
    """The shapes of the inputs without their example axes."""
    pairs = zip(flat.tensors, axes, strict=True)
    return tuple(tuple(size for i, size in enumerate(tensor.shape) if i != axis) for tensor, axis in pairs)


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.ndim == b.ndim and a.dtype == b.dtype
    return type(a) is type(b) and bool(a == b)


def _described(flat: FlatInputs) -> str:
    return ", ".join(
        f"{name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in zip(flat.names, flat.tensors, strict=True)
    )


def layouts_of(graph: Graph, loaded: Loaded, tensors: list[Tensor], count: int, index: str | None) -> Layouts:
    """The verified layouts of `count` examples, `tensors`; of graphs where an input holds their numbers (`index`)."""
    vector = batch_vector(loaded.flat.names, tensors, index)
    if vector is None or count == 1:
        return verify(graph, tensors, loaded.axes, count)
    edges = edge_lists(loaded.flat.names, tensors, len(vector))
    return verify_graphs(graph, tensors, owners(tensors, edges, vector, count))
