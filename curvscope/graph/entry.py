"""What the graph's shape tells: which layers read the model's inputs, what is normalised, which is the last layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from curvscope.graph.activations import LINEAR
from curvscope.graph.functional import Graph
from curvscope.graph.operands import SAME_VALUES, VIEWS, operand_of
from curvscope.graph.tap_places import INDEXING

aten = torch.ops.aten

# What an input may pass through on its way into its first layer without losing its scale.
UNCHANGED = {*SAME_VALUES, *VIEWS, *INDEXING, aten._to_copy.default}
UNCHANGED_NAMES = (
    "view",
    "reshape",
    "flatten",
    "squeeze",
    "select",
    "slice",
    "getitem",
    "unbind",
    "pad",
    "expand",
)


@dataclass(frozen=True)
class Shape:
    """Facts about the network as a whole.

    Attributes:
        first: layers whose input is an input of the model, unchanged.
        last: layers whose output is the model's output, but for views and sums.
        norms: how many normalisations there are.
        convolutions: how many convolutions with a parameter there are.
        repeated: layers that are called more than once.
    """

    first: tuple[str, ...]
    last: tuple[str, ...]
    norms: int
    convolutions: int
    repeated: tuple[str, ...]


def shape_of(graph: Graph) -> Shape | None:
    """The facts; None for a graph of eager modules, whose order is not seen."""
    if graph.plain is None:
        return None
    shapes = {name: p.shape for name, p in graph.parameters.items()}
    names = {spec.weight: name for name, spec in graph.layers.items() if not spec.exact_only}
    nodes = list(graph.plain.graph.nodes)
    first: dict[str, None] = {}
    for node in nodes:
        layer = _layer(node, shapes, names)
        if layer and any(_is_input(source) for source in _sources(node, shapes)):
            first[layer] = None
    output = next(node for node in nodes if node.op == "output")
    last: dict[str, None] = {}
    pending, seen = list(output.all_input_nodes), set()
    while pending:
        node = pending.pop(0)
        if node in seen:
            continue
        seen.add(node)
        layer = _layer(node, shapes, names)
        if layer:
            last[layer] = None
        elif _passes(node) or node.target is aten.add.Tensor:
            pending += node.all_input_nodes
    targets = [str(node.target) for node in nodes if node.op == "call_function"]
    norms = sum("norm" in target and "linalg" not in target for target in targets)
    return Shape(
        tuple(first),
        tuple(last),
        norms,
        sum(spec.kind.startswith("conv") for spec in graph.layers.values()),
        tuple(name for name, spec in graph.layers.items() if len(spec.sites) > 1 and not spec.exact_only),
    )


def _layer(node: fx.Node, shapes: Mapping[str, torch.Size], names: dict[str, str]) -> str:
    """The layer that a linear operation belongs to; empty for any other node."""
    if node.op != "call_function" or node.target not in LINEAR:
        return ""
    found = [operand_of(arg, shapes) for arg in node.all_input_nodes]
    return next((names[one.parameter] for one in found if one is not None and one.parameter in names), "")


def _sources(node: fx.Node, shapes: Mapping[str, torch.Size]) -> list[fx.Node]:
    """Where the data that a linear operation reads come from, seen through what leaves their scale alone."""
    pending: list[Any] = [arg for arg in node.all_input_nodes if operand_of(arg, shapes) is None]
    found, seen = [], set()
    while pending:
        source = pending.pop()
        if source in seen:
            continue
        seen.add(source)
        if _passes(source):
            pending += source.all_input_nodes
        else:
            found.append(source)
    return found


def _is_input(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "placeholder" and isinstance(value, torch.Tensor) and value.is_floating_point()


def _passes(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    return node.target in UNCHANGED or any(name in str(node.target) for name in UNCHANGED_NAMES)
