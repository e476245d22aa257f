"""Which bias trains with which weight, and where it stands in the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from curvscope.graph import sites as finding
from curvscope.graph.operands import MatrixForm, Part, operand_of
from curvscope.graph.products import Operation
from curvscope.graph.still import moving_nodes, reads_any

aten = torch.ops.aten


def biases_of(
    operations: Sequence[Operation],
    forms: dict[str, MatrixForm],
    parts: dict[fx.Node, Part],
    requires_grad: dict[str, bool],
    readers: dict[str, list[fx.Node]],
    shapes: dict[str, torch.Size],
) -> dict[str, str]:
    """Weight -> the bias that trains with it: row for row at every site of the weight, and nowhere else."""
    per_weight: dict[str, list[str | None]] = {}
    for operation in operations:
        weight = operation.weight
        bias = _bias_of(operation, forms[weight].d_out, parts[operation.node], shapes)
        per_weight.setdefault(weight, []).append(bias)
    chosen = {}
    for weight, biases in per_weight.items():
        bias = biases[0]
        same = bias is not None and set(biases) == {bias}
        if same and bias is not None and requires_grad[bias] and len(readers[bias]) == len(biases):
            chosen[weight] = bias
    return chosen


def _bias_of(operation: Operation, d_out: int, part: Part, shapes: dict[str, torch.Size]) -> str | None:
    """The parameter with a number for every row of the weight that the operation adds, or that is added right after."""
    if operation.kind == "embedding":
        return None
    if operation.bias is not None:
        node, found = operation.node, operand_of(operation.bias, shapes)
    else:
        users = list(operation.node.users)
        if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0].kwargs.get("alpha", 1) != 1:
            return None
        node = users[0]
        found = operand_of(node.args[1] if node.args[0] is operation.node else node.args[0], shapes)
    if found is None or shapes[found.parameter].numel() != d_out:
        return None
    places = finding.bias_places(found, operation, node)
    rows = torch.arange(d_out) if part.rows is None else part.rows
    return found.parameter if places is not None and torch.equal(places, rows) else None


def site_bias(
    operation: Operation,
    own: str | None,
    parameters: dict[str, Tensor],
    requires_grad: dict[str, bool],
) -> Tensor | None:
    """The operation's bias as the vector its site can hold; None without one, and where it has to stay an addition.

    The latter is a bias that is no parameter, and a trained one that is not the layer's own: its gradient is wanted.
    """
    if operation.bias is None:
        return None
    found = operand_of(operation.bias, {name: value.shape for name, value in parameters.items()})
    if found is None or (found.parameter != own and requires_grad[found.parameter]):
        return None
    places = finding.bias_places(found, operation, operation.node)
    value = parameters[found.parameter].flatten()
    whole = places is not None and torch.equal(places, torch.arange(value.numel()))
    return value if whole else None if places is None else value[places.to(value.device)]


def split_biases(graph: fx.Graph, free: Sequence[str]) -> None:
    """Make an addition of every trained bias of an operation that is no site, as under a frozen or computed weight."""
    moving = moving_nodes(graph)
    plain = {aten.addmm.default: aten.mm.default, aten.baddbmm.default: aten.bmm.default}
    for node in list(graph.nodes):
        convolution = node.target in finding.CONVOLUTIONS or node.target in finding.TRANSPOSED_CONVOLUTIONS
        if node not in moving or not (convolution or node.target is aten.linear.default or node.target in plain):
            continue
        args: list[Any] = list(node.args)
        place = 0 if node.target in plain else 2
        bias = args[place] if len(args) > place else None
        if not isinstance(bias, fx.Node) or bias in moving or not reads_any(bias, free) or node.kwargs:
            continue
        with graph.inserting_before(node):
            operation: Any = plain.get(node.target, node.target)
            args[place : place + 1] = [] if node.target in plain else [None]
            out = graph.call_function(operation, tuple(args))
            out.meta = dict(node.meta)
            spatial = node.meta["val"].ndim - 2 if convolution else 0
            if convolution:
                bias = graph.call_function(aten.reshape.default, (bias, [-1] + [1] * spatial))
            out = graph.call_function(aten.add.Tensor, (out, bias))
        out.meta = dict(node.meta)
        node.replace_all_uses_with(out)
        graph.erase_node(node)


def with_addition(graph: fx.Graph, out: fx.Node, bias: Any, kind: str) -> fx.Node:
    """The output with a bias that stays an addition."""
    if kind != "linear":
        bias = graph.call_function(aten.reshape.default, (bias, [-1] + [1] * finding.spatial_dims(kind)))
    return graph.call_function(aten.add.Tensor, (out, bias))
