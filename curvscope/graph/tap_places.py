"""Where a parameter, or a value computed from parameters alone, meets an example, and what a tap reads there."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from curvscope.graph.operands import SAME_VALUES, TRANSPOSES
from curvscope.graph.reasons import is_product, operation_name
from curvscope.graph.replay import replay_of
from curvscope.graph.still import CHOICES, ancestors, stands_alone, symbolic
from curvscope.graph.tap import Member

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


def norm_kind(target: Any) -> str:
    """The operation's name as torch.nn.functional has it."""
    return str(target).removeprefix("aten.").split(".")[0].removeprefix("_native_").removesuffix("_legit_no_training")


NORM_KINDS = {norm_kind(target) for target in NORMS}


COMPUTED = "computed"  # the kind of a product whose weight is computed, with the product's name behind it


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


@dataclass(frozen=True)
class Source:
    """What a tap's operation combines with the examples: a parameter, or a value computed from parameters alone."""

    name: str
    shape: torch.Size
    node: fx.Node
    is_parameter: bool


@dataclass(frozen=True)
class Read:
    """A source at its consumer, behind a chain of indexing operations."""

    source: Source
    end: fx.Node
    chain: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Place:
    """A tap for one read: behind which node, of what kind, with which member."""

    node: fx.Node
    kind: str
    member: Member


def reads_of(root: nn.Module, name: str, start: fx.Node, moving: Container[fx.Node]) -> Iterator[Read]:
    """Every place where the parameter, or a value computed from it alone, meets an example.

    A value that was spread over the batch meets the examples where that was done.
    """
    pending, seen = [start], {start}
    whole = Source(name, root.get_buffer(name).shape, start, True)
    while pending:
        node = pending.pop(0)
        shape = _fixed_shape(node)
        alone = node is start or (shape is not None and stands_alone(node))
        source = (
            whole if node is start or shape is None or not alone else Source(f"value {node.name}", shape, node, False)
        )
        before = () if alone else _between(start, node)
        walk: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(node, before)]
        while walk:
            shown, chain = walk.pop(0)
            for user in shown.users:
                if user.op == "call_function" and user.target in INDEXING and user.args[0] is shown:
                    walk.append((user, (*chain, user)))
                elif user in moving or (symbolic(shown) and user.op != "call_function"):
                    yield Read(source, shown if user.op == "output" else user, chain)
                elif user not in seen:
                    seen.add(user)
                    pending.append(user)


def _between(start: fx.Node, end: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes on the ways from one node to another, without the first, in order."""
    needed = ancestors(end)
    found: dict[fx.Node, None] = {start: None}
    for node in start.graph.nodes:
        if node in needed and any(parent in found for parent in node.all_input_nodes):
            found[node] = None
    return tuple(node for node in found if node is not start)


def _fixed_shape(node: fx.Node) -> torch.Size | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape):
        return None
    return torch.Size(value.shape)


def place_of(graph: fx.Graph, root: nn.Module, read: Read) -> Place | None:
    """Where a tap can stand for this read; None where no tap can."""
    source, end, chain = read.source, read.end, list(read.chain)
    shown = chain[-1] if chain else source.node
    indexed = all(node.target in INDEXING for node in chain)
    # the row of padding_idx gets no gradient, which only the operation itself knows
    padded = any(node.target is aten.embedding.default and node.args[2:3] not in ((), (-1,)) for node in chain)
    if end.target in NORMS and not chain and source.is_parameter:
        place = _norm_place(graph, source.name, end)
        if place is not None:
            return place
    if indexed and not padded:
        derivative = _derivative(graph, end, shown) if end.op == "call_function" else None
        if derivative is not None:
            role, other, channels_first = derivative
            index = _index_chain(graph, root, source, chain)
            kind = "scale" if role == "scale" else "shift"
            return Place(end, kind, Member(source.name, role, channels_first, index, other))
        # what was read itself: a token put before every example, or a table that is looked up
        spread = shown.target in (aten.expand.default, aten.repeat.default, aten.embedding.default)
        if chain and (spread or symbolic(shown)):
            return Place(shown, "shift", Member(source.name, "shift", index=_index_chain(graph, root, source, chain)))
    plan = replay_of(root, source.node, chain, end)
    if plan is None:
        return None
    is_weight = not source.is_parameter and is_product(end)
    kind = f"{COMPUTED} {operation_name(end)}" if is_weight else operation_name(end)
    return Place(plan.output, kind, Member(source.name, "replayed", replay=plan.replay, arguments=plan.arguments))


def _derivative(graph: fx.Graph, end: fx.Node, shown: fx.Node) -> tuple[str, fx.Node | None, bool] | None:
    """The role of `shown` in an elementwise operation, what it is multiplied with, and whether it belongs to axis 1.

    The operation's derivative with respect to it is 1 (shift), -1 (minus) or that other operand (scale).
    """
    args: list[Any] = list(end.args)
    places = [place for place, arg in enumerate(args) if arg is shown]
    if len(places) != 1 or shown in end.kwargs.values():
        return None
    place, target, alpha = places[0], end.target, end.kwargs.get("alpha", 1)

    def then(operation: Any, *given: Any, **options: Any) -> fx.Node:
        return graph.call_function(operation, given, options)

    def shift(sign: int = 1) -> tuple[str, fx.Node | None, bool] | None:
        return ("shift" if sign == 1 else "minus", None, False) if place == 0 or alpha == 1 else None

    following = end.next
    with graph.inserting_before(following):
        other: fx.Node
        channels_first = False
        if target is aten.add.Tensor:
            return shift()
        if target is aten.sub.Tensor:
            return shift(1 if place == 0 else -1)
        if target is aten.mul.Tensor:
            other = args[1 - place]
        elif target is aten.div.Tensor:
            other = (
                then(aten.reciprocal.default, args[1])
                if place == 0
                else then(aten.neg.default, then(aten.div.Tensor, end, shown))
            )
        elif target is aten.addcmul.default:
            if place == 0:
                return "shift", None, False
            other = then(aten.mul.Tensor, args[3 - place], end.kwargs.get("value", 1))
        elif target in CHOICES and place:
            chosen = args[0] if place == 1 else then(aten.logical_not.default, args[0])
            other = then(aten.mul.Tensor, then(aten.ones_like.default, end), chosen)
        elif target is aten.lerp.Tensor:
            if place == 2:
                other = then(aten.sub.Tensor, args[1], args[0])
            else:
                other = args[2] if place == 1 else then(aten.rsub.Scalar, args[2], 1)
        elif target is aten.pow.Tensor_Tensor:
            if place == 0:
                lower = then(aten.pow.Tensor_Tensor, shown, then(aten.sub.Tensor, args[1], 1))
                other = then(aten.mul.Tensor, args[1], lower)
            else:
                other = then(aten.mul.Tensor, end, then(aten.log.default, args[0]))
        elif target is aten.prelu.default and place == 1:
            other = then(aten.clamp.default, args[0], None, 0)
            channels_first = args[0].meta["val"].ndim > 1
        else:
            return None
        return ("scale", then(aten.detach.default, other), channels_first) if isinstance(other, fx.Node) else None


def _norm_place(graph: fx.Graph, name: str, end: fx.Node) -> Place | None:
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
    kind = norm_kind(end.target)
    if places[0] == bias:
        return Place(output, kind, Member(name, "shift", channels_first))
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
    return Place(output, kind, Member(name, "scale", channels_first, other=plain))


def _parameter(node: fx.Node) -> str | None:
    while node.op == "call_function" and node.target in SAME_VALUES:
        node = node.args[0]  # type: ignore[assignment]
    return str(node.target) if node.op == "get_attr" else None


def _index_chain(graph: fx.Graph, root: nn.Module, source: Source, chain: list[fx.Node]) -> fx.Node | None:
    """The same indexing applied to the places of the source's entries; None where nothing is indexed."""
    if not chain:
        return None
    attribute = "curvscope_places_" + source.name.replace(".", "_").replace(" ", "_")
    if not hasattr(root, attribute):
        device = next(root.buffers()).device
        places = torch.arange(source.shape.numel(), dtype=torch.float64, device=device)
        root.register_buffer(attribute, places.view(source.shape), persistent=False)
    with graph.inserting_after(chain[-1]):
        moved = graph.get_attr(attribute)
    for node in chain:
        args = tuple(moved if position == 0 else arg for position, arg in enumerate(node.args))
        operation: Any = node.target
        with graph.inserting_after(moved):  # each behind the one before: all inside the chain's own place
            moved = graph.call_function(operation, args, dict(node.kwargs))
    return moved
