"""How the operations of one weight read it: the one matrix they agree on, and the role each has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from curvscope.graph import sites as finding
from curvscope.graph.operands import SAME_VALUES, VIEWS, WHOLE, MatrixForm, Part, matrix_form
from curvscope.graph.products import Operation
from curvscope.graph.still import symbolic

aten = torch.ops.aten


@dataclass(frozen=True)
class Role:
    """What an operation uses its weight as, and whether that is the transpose of the first operation's matrix."""

    name: str
    flipped: bool


def agreed_form(calls: Sequence[Operation], shape: torch.Size) -> tuple[MatrixForm, list[Part]] | None:
    """The matrix of which all these operations read a part, if they agree on one."""
    groups = {call.groups for call in calls}
    if len(groups) > 1 or len({call.kind for call in calls}) > 1:
        return None
    count = groups.pop()
    readings = [call.reading for call in calls]
    view = tuple(shape)
    if any(len(reading.operand.sizes) > len(shape) and reading.groups for reading in readings):
        view = (count, shape[0] // count, *shape[1:])
    return matrix_form(view, readings, whole=count > 1)


def roles_of(
    calls: Sequence[Operation], shape: torch.Size
) -> tuple[tuple[MatrixForm, list[Part]] | None, dict[fx.Node, Role]]:
    """The first use's matrix and every operation's role, of a whole matrix that is used in several ways."""
    kinds = {call.kind for call in calls}
    forms = []
    for call in calls:
        alone = matrix_form(tuple(shape), [call.reading], whole=False) if len(shape) == 2 else None
        if alone is None or alone[1] != [WHOLE] or call.groups > 1 or not kinds <= {"linear", "embedding"}:
            return None, {}
        forms.append(alone[0])
    found = {}
    for call, form in zip(calls, forms, strict=True):
        name = finding.role_name(call.kind, form.order == (1, 0), kinds)
        found[call.node] = Role(name, form.order != forms[0].order)
    return (forms[0], [WHOLE] * len(calls)), found


def without_tables(operations: Sequence[Operation], readers: dict[str, list[fx.Node]]) -> list[Operation]:
    """The operations without look-ups in weights that nothing but taps can serve.

    Those are tables of positions, whose rows belong to no example, and parameters that are also read otherwise.
    """
    nodes = {operation.node for operation in operations}
    linear = {operation.weight for operation in operations if operation.kind != "embedding"}
    tables = {
        operation.weight
        for operation in operations
        if operation.weight not in linear
        and (not follows_examples(operation, [operation]) or not nodes.issuperset(readers[operation.weight]))
    }
    return [operation for operation in operations if operation.weight not in tables]


def mixed_roles(operations: Sequence[Operation], readers: dict[str, list[fx.Node]]) -> set[str]:
    """Weights that are read by something else than linear operations, too."""
    nodes = {operation.node for operation in operations}
    return {operation.weight for operation in operations if not nodes.issuperset(readers[operation.weight])}


def readers_of(graph: fx.Graph, parameters: set[str]) -> dict[str, list[fx.Node]]:
    """Parameter name -> the operations that read it, seen through aliases and views."""
    readers: dict[str, list[fx.Node]] = {name: [] for name in parameters}
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) in parameters:
            pending = list(node.users)
            while pending:
                user = pending.pop(0)
                if user.op == "call_function" and user.target in (*SAME_VALUES, *VIEWS):
                    pending += list(user.users)
                elif user.op != "output":
                    readers[str(node.target)].append(user)
    return readers


def follows_examples(call: Operation, calls: Sequence[Operation]) -> bool:
    """Whether the operation's rows belong to examples: they depend on the inputs, or run along the examples' axis.

    A recurrent layer's first step takes zeros, one row for each example.
    """
    if depends_on_inputs(call.node) or symbolic(call.node):
        return True
    return any(depends_on_inputs(other.node) and str(_shape(other.node)) == str(_shape(call.node)) for other in calls)


def _shape(node: fx.Node) -> list[Any]:
    return list(node.meta["val"].shape)


def depends_on_inputs(node: fx.Node) -> bool:
    """Whether any user input is among the node's ancestors."""
    seen: set[fx.Node] = set()
    pending = list(node.all_input_nodes)
    while pending:
        parent = pending.pop()
        if parent in seen:
            continue
        seen.add(parent)
        # A size read off an input is no dependence on its values.
        if parent.op == "placeholder" and isinstance(parent.meta.get("val"), Tensor):
            return True
        if parent.target is not aten.sym_size.int:
            pending += parent.all_input_nodes
    return False


def stored(operation: Operation, value: Tensor) -> Tensor:
    """The operation's weight as its module stores it, a view of the parameter's value where strides allow."""
    reading = operation.reading
    if operation.kind != "linear" and not reading.operand.chain:
        return value
    matrix = reading.matrix(value)
    if operation.kind == "linear":
        return matrix
    sizes = [reading.operand.sizes[axis] for axis in reading.ins]
    kernel = matrix.reshape(-1, *sizes)
    return kernel.transpose(0, 1) if "transpose" in operation.kind else kernel
