"""An operation of the graph as a function of one of its operands, to be run again for single examples.

Elementwise operations, norms and products with a parameter have rules of their own. For every other one (a linear
operation whose weight is computed, a distance to prototypes, a bag of embeddings) autograd through the operation alone,
with the outputs of one example, gives that example's gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten


class Replay(nn.Module):
    """`(operand, *inputs) -> output`: the operation, with what indexes the operand on its way there."""

    def __init__(self, compute: fx.GraphModule) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, operand: Tensor, *inputs: Any) -> Tensor:
        """The operation's output."""
        output: Tensor = self.compute(operand, *inputs)
        return output


@dataclass(frozen=True)
class ReplayPlan:
    """A replay with the nodes that hold its arguments: the operand first; `output` is what it computes."""

    replay: Replay
    arguments: tuple[fx.Node, ...]
    output: fx.Node


def replay_of(root: nn.Module, source: fx.Node, chain: Sequence[fx.Node], end: fx.Node) -> ReplayPlan | None:
    """The operation `end` as a function of `source`, which reaches it through `chain`; None where it can't be told.

    That is where it is no operation of torch's own, or returns several tensors of which more than one is used.
    """
    output = _the_tensor(end)
    if output is None:
        return None
    graph = fx.Graph()
    copied = {source: graph.placeholder("operand")}
    body = [*chain, end] if output is end else [*chain, end, output]
    needed = [node for each in body for node in each.all_input_nodes if node not in (source, *body)]
    inputs = list(dict.fromkeys(needed))
    copied |= {node: graph.placeholder(f"input_{index}") for index, node in enumerate(inputs)}
    for node in body:
        copied[node] = graph.node_copy(node, lambda old: copied[old])
    graph.output(copied[output])
    with source.graph.inserting_before(end):
        arguments = [source, *inputs]
        held = tuple(_cut(source.graph, node) for node in arguments)
    return ReplayPlan(Replay(fx.GraphModule(root, graph)), held, output)


def _cut(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The node's value without its gradient; numbers and parameters as they are."""
    if node.op == "get_attr" or not isinstance(node.meta.get("val"), Tensor):
        return node
    return graph.call_function(aten.detach.default, (node,))


def _the_tensor(end: fx.Node) -> fx.Node | None:
    """The one tensor of the operation that is used: itself, or its only item that is read."""
    if end.op != "call_function" or not isinstance(end.target, torch._ops.OpOverload):
        return None
    value = end.meta.get("val")
    if isinstance(value, Tensor):
        return end if _differentiable(value) else None
    if not isinstance(value, (tuple, list)) or not all(user.target is operator.getitem for user in end.users):
        return None
    used = [user for user in end.users if user.users]
    if len(used) != 1 or not _differentiable(used[0].meta.get("val")):
        return None
    return used[0]


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
