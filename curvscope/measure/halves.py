"""The network on parts of its batch: what tells a property of the model from one of the examples drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvscope.graph.functional import Graph
from curvscope.graph.layout import Layout
from curvscope.load.problem import Loss
from curvscope.measure.network import Network

MATCH = 1e-3


@dataclass(frozen=True)
class Half:
    """The network on some of the examples; `scale` brings its loss to that of as many examples as the batch has."""

    network: Network
    examples: int
    scale: float


@dataclass(frozen=True)
class Batch:
    """What can be taken apart: the network, its inputs' example axes (None: shared), the output's layout, N."""

    network: Network
    graph: Graph
    loss: Loss
    axes: Sequence[int | None]
    output: Layout
    examples: int


def halves(batch: Batch, *, seed: int, count: int = 2) -> list[Half] | str:
    """`count` random halves, each followed by its complement, or in words why there are none.

    A graph with a fixed batch size takes each half's examples twice. Whether the loss is a mean or a sum over examples
    shows in its values on the halves: a sum's halves are scaled up to N examples.
    """
    if batch.examples < 4:
        return f"a batch of {batch.examples} can't be halved"
    generator = torch.Generator().manual_seed(seed)
    found: list[Half] = []
    whole = batch.network.loss()
    while len(found) < count:
        order = torch.randperm(batch.examples, generator=generator)
        pair = (order[: batch.examples // 2], order[batch.examples // 2 :])
        try:
            networks = [_part(batch, index) for index in pair]
            twice = False
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
            if batch.examples % 2:
                return "the graph has a fixed batch size, which is odd"
            try:
                networks = [_part(batch, torch.cat([index, index])) for index in pair]
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                return "the model or its loss does not run on half of the batch"
            twice = True
        first, second = (network.loss() for network in networks)
        room = MATCH * abs(whole)
        if twice or min(first, second) - room <= whole <= max(first, second) + room:
            scales = (1.0, 1.0)
        elif abs(first + second - whole) <= room:
            scales = tuple(batch.examples / len(index) for index in pair)  # type: ignore[assignment]
        else:
            return "the loss on the halves is neither a mean nor a sum over examples"
        found += [
            Half(network, len(index), scale) for network, index, scale in zip(networks, pair, scales, strict=True)
        ]
    return found[:count]


def _part(batch: Batch, index: Tensor) -> Network:
    """The network on the examples `index`."""
    tensors = [
        tensor if axis is None else tensor.index_select(axis, index.to(tensor.device))
        for tensor, axis in zip(batch.network.tensors, batch.axes, strict=True)
    ]
    return Network(batch.graph, tensors, batch.loss, _selected(batch, batch.network.targets, index))


def _selected(batch: Batch, targets: Any, index: Tensor) -> Any:
    """The targets of these examples; they lie as the output does.

    Raises:
        ValueError: they do not.
    """
    if isinstance(targets, Mapping):
        return {key: _selected(batch, value, index) for key, value in targets.items()}
    if isinstance(targets, (tuple, list)):
        return type(targets)(_selected(batch, value, index) for value in targets)
    layout = batch.output
    size = layout.outer * batch.examples * layout.inner
    if not isinstance(targets, Tensor) or targets.ndim <= layout.axis or targets.shape[layout.axis] != size:
        raise ValueError("targets that do not lie as the output does")
    shape = list(targets.shape)
    chosen = layout.split(targets)[index.to(targets.device)].movedim(0, layout.axis + 1)
    shape[layout.axis] = layout.outer * len(index) * layout.inner
    return chosen.reshape(shape)
