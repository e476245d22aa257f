"""Parameters without a Kronecker form: norms' weights, and parameters that are added or multiplied.

Such a parameter reaches the graph through indexing alone (views, slices, tables of positions) and is then combined
element by element. A tap behind that operation sees its output gradient, from which the parameter's own gradient for
every example follows; with it comes the exact block.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from curvscope.graph.sites import SAME_VALUES, TRANSPOSES

aten = torch.ops.aten

# normalisation -> positions of its weight and bias among the arguments, and whether they belong to axis 1
NORMS: dict[Any, tuple[int, int | None, bool]] = {
    aten.layer_norm.default: (2, 3, False),
    aten.rms_norm.default: (2, None, False),
    aten.batch_norm.default: (1, 2, True),
    aten._native_batch_norm_legit_no_training.default: (1, 2, True),
    aten.group_norm.default: (2, 3, True),
    aten.instance_norm.default: (1, 2, True),
}
INDEXING = {
    *SAME_VALUES,
    *TRANSPOSES,
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
    aten.expand.default,
    aten.repeat.default,
    aten.flatten.using_ints,
    aten.index.Tensor,
    aten.index_select.default,
    aten.embedding.default,
}
ELEMENTWISE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)
CHOICES = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)


@dataclass(frozen=True)
class Member:
    """One parameter behind a tap.

    Attributes:
        parameter: its name.
        role: scale (times `other`), shift, or minus.
        channels_first: it belongs to axis 1 of the output; otherwise it broadcasts as it is.
        index: the node that holds, for every element that was read, its place in the parameter (None: read whole).
    """

    parameter: str
    role: str
    channels_first: bool
    index: fx.Node | None


@dataclass(frozen=True)
class TapPlan:
    """A tap to insert behind `node`; `other` is what a scale is multiplied with (None: nothing is)."""

    node: fx.Node
    kind: str
    members: tuple[Member, ...]
    other: fx.Node | None


class Tap(nn.Module):
    """Hands its first argument on; BackPACK keeps all of them for the extension.

    Attributes:
        members: what is read there, in the order of the further arguments: first what a scale is multiplied with (if
            any member is one), then the index of every member that has one.
        shapes: the shape of every member.
    """

    def __init__(self, members: tuple[Member, ...], shapes: dict[str, torch.Size]) -> None:
        super().__init__()
        self.members = members
        self.shapes = shapes

    def forward(self, output: Tensor, *extra: Tensor) -> Tensor:
        """The output itself."""
        return output.view_as(output)


def find_taps(graph: fx.Graph, root: nn.Module, wanted: Sequence[str]) -> list[TapPlan]:
    """Taps for those of the wanted parameters that every reader allows one for, in forward order.

    Inserts the index chains and the operands that the taps need; what stays unused is dead code.
    """
    reads: dict[str, list[tuple[fx.Node, list[fx.Node]]]] = {name: [] for name in wanted}
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target) in wanted:
            reads[str(node.target)] += list(_ends(node, []))
    plans: dict[tuple[fx.Node, str], TapPlan] = {}
    scaled: dict[fx.Node, str] = {}
    mixed: set[fx.Node] = set()
    for name, ends in reads.items():
        found = [_plan(graph, root, name, end, chain) for end, chain in ends]
        complete = [plan for plan in found if plan is not None]
        if not found or len(complete) < len(found):
            continue
        for plan in complete:
            if plan.other is not None and scaled.setdefault(plan.node, name) != name:
                mixed.add(plan.node)  # two parameters multiplied with each other
            key = (plan.node, name.rpartition(".")[0])
            known = plans.get(key)
            if known is not None:
                members, other = (*known.members, *plan.members), known.other or plan.other
                plan = TapPlan(plan.node, plan.kind, members, other)
            plans[key] = plan
    lost = {member.parameter for plan in plans.values() if plan.node in mixed for member in plan.members}
    order = {node: index for index, node in enumerate(graph.nodes)}
    kept = [plan for plan in plans.values() if not lost & {member.parameter for member in plan.members}]
    return sorted(kept, key=lambda plan: order[plan.node])


def _ends(node: fx.Node, chain: list[fx.Node]) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Where the parameter leaves the indexing operations: (consumer, the indexing nodes before it)."""
    for user in node.users:
        if user.op == "call_function" and user.target in INDEXING and user.args[0] is node:
            yield from _ends(user, [*chain, user])
        elif user.op != "output":
            yield user, chain
        else:
            yield node, chain


def _plan(graph: fx.Graph, root: nn.Module, name: str, end: fx.Node, chain: list[fx.Node]) -> TapPlan | None:
    source = chain[-1] if chain else None
    if any(node.target is aten.embedding.default and node.args[2:3] not in ((), (-1,)) for node in chain):
        return None  # the row of padding_idx gets no gradient: its entries would have to be told apart
    args: list[Any] = list(end.args)
    if end.op != "call_function":
        return _read_plan(graph, root, name, source, chain)
    if end.target in NORMS and not chain:
        return _norm_plan(graph, name, end)
    read = source if source is not None else next(a for a in end.all_input_nodes if str(a.target) == name)
    if end.target in CHOICES:
        return _choice_plan(graph, root, name, end, chain, read)
    if end.target in ELEMENTWISE and end.kwargs.get("alpha", 1) == 1 and len(args) == 2 and args[0] is not args[1]:
        if not all(isinstance(arg, fx.Node) for arg in args):
            return None
        other = args[1] if args[0] is read else args[0]
        index = _index_chain(graph, root, name, chain)
        if end.target is aten.mul.Tensor:
            with graph.inserting_after(end):
                still = graph.call_function(aten.detach.default, (other,))
            return TapPlan(end, "scale", (Member(name, "scale", False, index),), still)
        role = "minus" if end.target is aten.sub.Tensor and args[1] is read else "shift"
        return TapPlan(end, "shift", (Member(name, role, False, index),), None)
    return _read_plan(graph, root, name, source, chain)


def _read_plan(
    graph: fx.Graph, root: nn.Module, name: str, source: fx.Node | None, chain: list[fx.Node]
) -> TapPlan | None:
    """A tap on what was read itself: a token put before every example, or a table that is looked up."""
    if source is None or source.target not in (aten.expand.default, aten.repeat.default, aten.embedding.default):
        return None
    return TapPlan(source, "shift", (Member(name, "shift", False, _index_chain(graph, root, name, chain)),), None)


def _choice_plan(
    graph: fx.Graph, root: nn.Module, name: str, end: fx.Node, chain: list[fx.Node], read: fx.Node
) -> TapPlan | None:
    """`where(mask, p, other)`, as masked biases of attention are written: p times the mask, shifted."""
    args: list[Any] = list(end.args)
    places = [i for i in (1, 2) if args[i] is read]
    if len(places) != 1:
        return None
    mask = last = args[0]
    with graph.inserting_after(end):
        if places == [2]:
            mask = last = graph.call_function(aten.logical_not.default, (mask,))
    with graph.inserting_after(end if last is args[0] else last):
        still = graph.call_function(aten.to.dtype, (mask, root.get_buffer(name).dtype))
    return TapPlan(end, "shift", (Member(name, "scale", False, _index_chain(graph, root, name, chain)),), still)


def _norm_plan(graph: fx.Graph, name: str, end: fx.Node) -> TapPlan | None:
    weight, bias, channels_first = NORMS[end.target]
    args: list[Any] = list(end.args)
    places = [i for i, arg in enumerate(args) if isinstance(arg, fx.Node) and _parameter(arg) == name]
    if len(places) != 1 or places[0] not in (weight, bias):
        return None
    output = end
    if isinstance(end.meta.get("val"), (tuple, list)):
        firsts = [user for user in end.users if user.args[1] == 0]
        if len(firsts) != 1:
            return None
        output = firsts[0]
    kind = (
        str(end.target).removeprefix("aten.").split(".")[0].removeprefix("_native_").removesuffix("_legit_no_training")
    )
    if places[0] == bias:
        return TapPlan(output, kind, (Member(name, "shift", channels_first, None),), None)
    for place in (weight, bias):
        if place is not None and place < len(args):
            args[place] = None
    with graph.inserting_after(output):
        operation: Any = end.target
        plain = graph.call_function(operation, tuple(args), dict(end.kwargs))
    if output is not end:
        with graph.inserting_after(plain):
            plain = graph.call_function(operator.getitem, (plain, 0))
    with graph.inserting_after(plain):
        plain = graph.call_function(aten.detach.default, (plain,))
    return TapPlan(output, kind, (Member(name, "scale", channels_first, None),), plain)


def _parameter(node: fx.Node) -> str | None:
    while node.op == "call_function" and node.target in SAME_VALUES:
        node = node.args[0]  # type: ignore[assignment]
    return str(node.target) if node.op == "get_attr" else None


def _index_chain(graph: fx.Graph, root: nn.Module, name: str, chain: list[fx.Node]) -> fx.Node | None:
    """The same indexing applied to the places of the parameter's entries; None where nothing is indexed."""
    if not chain:
        return None
    attribute = "curvscope_places_" + name.replace(".", "_")
    if not hasattr(root, attribute):
        parameter = root.get_buffer(name)
        places = torch.arange(parameter.numel(), dtype=torch.float64, device=parameter.device)
        root.register_buffer(attribute, places.view(parameter.shape), persistent=False)
    with graph.inserting_after(chain[-1]):
        moved = graph.get_attr(attribute)
    for node in chain:
        args = tuple(moved if position == 0 else arg for position, arg in enumerate(node.args))
        operation: Any = node.target
        with graph.inserting_after(moved):  # each behind the one before: all inside the chain's own place
            moved = graph.call_function(operation, args, dict(node.kwargs))
    return moved
