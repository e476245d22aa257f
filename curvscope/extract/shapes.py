"""The layouts of all batches: verified once for every shape of the inputs, and known from then on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvscope.errors import CurvscopeError, out_of_memory
from curvscope.extract.loaded import Loaded, layouts_of, sizes
from curvscope.graph.functional import Graph
from curvscope.graph.prepare import Prepared
from curvscope.graph.trial import refused
from curvscope.graph.verify import Layouts


class Shapes:
    """Verified layouts by the shapes of the inputs, the example axis aside; `many` says that there are batches."""

    def __init__(self, graph: Graph, prepared: Prepared, many: bool) -> None:
        self.graph = graph
        self.prepared = prepared
        self.many = many
        self._known: dict[tuple[tuple[int, ...], ...], Layouts] = {}

    @property
    def routed(self) -> bool:
        """Whether some layouts are those of one whole batch alone."""
        return any(known.routed for known in self._known.values())

    def of(self, loaded: Loaded) -> Layouts:
        """The layouts that hold for batches of this shape; their `outputs` have a shape and no memory.

        Where rows are routed, or may be, every batch has its own.

        Raises:
            LayoutError, ModelError, BatchError: see `curvscope.graph.verify`.
        """
        shape = sizes(loaded.flat, loaded.axes)
        known = self._known.get(shape)
        if known is None or (self.many and (known.routed or self.graph.routes is None)):
            self.verify(loaded, loaded.examples)
        if known is not None:
            self._known[shape] = replace(self._known[shape], tokens=known.tokens)
        return self._known[shape]

    def verify(self, loaded: Loaded, count: int) -> Layouts:
        """The layouts of the first `count` examples of a batch, with their outputs.

        Raises:
            LayoutError, ModelError, BatchError: see `curvscope.graph.verify`.
        """
        tensors = taken(loaded, 0, count)
        if count == 1 and self.many and self.prepared.any_size:
            # one example tells no axis: two copies do
            count = 2
            tensors = [
                tensor if axis is None else torch.cat([tensor, tensor], dim=axis)
                for tensor, axis in zip(tensors, loaded.axes, strict=True)
            ]
        with refusals(loaded):
            layouts = layouts_of(self.graph, loaded, tensors, count, self.prepared.index)
            if count > loaded.examples and layouts.routed:
                # two copies have twice the rows, in another order
                count, tensors = 1, taken(loaded, 0, 1)
                layouts = replace(layouts_of(self.graph, loaded, tensors, 1, self.prepared.index), routed=True)
        if count > loaded.examples:
            layouts = replace(layouts, examples=1, outputs=layouts.output.take(layouts.outputs, 0, 1))
        # the shape is all that is kept of the outputs
        outputs = layouts.outputs.new_zeros(()).expand(layouts.outputs.shape)
        self._known[sizes(loaded.flat, loaded.axes)] = replace(layouts, outputs=outputs)
        return layouts

    def say(self, **fields: Any) -> None:
        """From now on all layouts have these fields."""
        self._known = {shape: replace(known, **fields) for shape, known in self._known.items()}


def taken(loaded: Loaded, low: int, high: int) -> list[Tensor]:
    """The inputs of the examples from `low` to `high`."""
    return [
        tensor if axis is None else tensor.narrow(axis, low, high - low)
        for tensor, axis in zip(loaded.tensors, loaded.axes, strict=True)
    ]


@contextlib.contextmanager
def refusals(loaded: Loaded) -> Iterator[None]:
    """A model that fails inside is refused in words; memory that runs out is not the model's fault.

    Raises:
        ModelError: what the model said, with the inputs it was given.
    """
    try:
        yield
    except CurvscopeError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if out_of_memory(error):
            raise
        raise refused(error, loaded.flat) from error
