"""Values computed from parameters alone, before any example comes in: position tables through an MLP, clamped scales.

All examples share such a value, so autograd can't tell their gradients apart behind it. In front of it a tap can: what
it finds for each example is pulled back through the computation, which is the same for all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Sequence

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten

CHOICES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)


def moving_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values depend on those of the inputs (a size read off an input is none).

    A choice by a mask that was expanded to the batch counts as well: it has rows for every example.
    """
    moving: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            is_moving = not isinstance(node.meta.get("val"), (int, float, torch.SymInt))
        else:
            is_moving = node.target is not aten.sym_size.int and any(p in moving for p in node.all_input_nodes)
            is_moving = is_moving or (node.target in CHOICES and symbolic(node))
        if is_moving or node.op == "output":
            moving.add(node)
    return moving


def symbolic(node: fx.Node) -> bool:
    """Whether the size of some axis changes with the batch."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(not isinstance(size, int) for size in value.shape)


class Pull(nn.Module):
    """The gradients of parameters for each example, from those of a value that is computed from them."""

    def __init__(self, compute: fx.GraphModule, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.compute = compute
        self.parameters_pulled = parameters

    def forward(self, gradients: Tensor) -> dict[str, Tensor]:
        """[N, numbers of the value] -> parameter: [N, numbers of it]."""
        names = list(self.parameters_pulled)
        with torch.enable_grad(), warnings.catch_warnings():
            # operations without a batching rule are looped over, with a warning
            warnings.filterwarnings("ignore", message=".*performance drop because.*")
            fresh = [self.parameters_pulled[name].detach().requires_grad_() for name in names]
            value = self.compute(*fresh)
            if not value.requires_grad:
                return {}  # nothing of them is left but constants, as behind a detach
            found = torch.autograd.grad(
                value,
                fresh,
                gradients.reshape(-1, *value.shape),
                is_grads_batched=True,
                allow_unused=True,
            )
        return {
            name: grad.detach().reshape(len(gradients), -1)
            for name, grad in zip(names, found, strict=True)
            if grad is not None
        }


def ancestors(value: fx.Node) -> set[fx.Node]:
    """The node and everything that it is computed from."""
    needed: set[fx.Node] = set()
    pending = [value]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    return needed


def stands_alone(value: fx.Node) -> bool:
    """Whether the value can be computed from the model alone, without even the batch's size."""
    return all(node.op in ("get_attr", "call_function") for node in ancestors(value))


def reads_any(value: fx.Node, names: Container[str]) -> bool:
    """Whether one of these parameters is among what the value is computed from."""
    return any(node.op == "get_attr" and str(node.target) in names for node in ancestors(value))


def pull_back(root: nn.Module, value: fx.Node, names: Sequence[str]) -> Pull:
    """How the gradients of these parameters follow from the value's."""
    graph = fx.Graph()
    own = {name: graph.placeholder(f"parameter_{index}") for index, name in enumerate(names)}
    needed, copied = ancestors(value), {}
    for node in value.graph.nodes:
        if node not in needed:
            continue
        if node.op == "get_attr" and str(node.target) in own:
            copied[node] = own[str(node.target)]
        else:
            copied[node] = graph.node_copy(node, lambda old: copied[old])
    graph.output(copied[value])
    parameters: dict[str, Tensor] = {name: root.get_buffer(name) for name in names}
    return Pull(fx.GraphModule(root, graph), parameters)
