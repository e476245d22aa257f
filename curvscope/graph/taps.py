"""Parameters without a Kronecker form: norms' weights, and parameters that are added or multiplied.

Such a parameter reaches the graph through indexing alone (views, slices, tables of positions) and is then combined
element by element. A tap behind that operation sees its output gradient, from which the parameter's own gradient for
every example follows; with it comes the exact block.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from curvscope.graph.operands import SAME_VALUES, TRANSPOSES
from curvscope.graph.reasons import UNREACHED, is_product, operation_name, why_no_tap
from curvscope.graph.replay import Replay, replay_of
from curvscope.graph.still import CHOICES, Pull, ancestors, moving_nodes, pull_back, stands_alone, symbolic

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
class Member:
    """One parameter, or one value computed from parameters, behind a tap.

    Attributes:
        parameter: its name.
        role: scale (times `other`), shift, minus, or replayed.
        channels_first: it belongs to axis 1 of the output; otherwise it broadcasts as it is.
        index: the node that holds, for every element that was read, its place in the parameter (None: read whole).
        other: the node that a scale is multiplied with.
        replay: the operation as a function of it, where that has no rule of its own, and `arguments` the nodes that
            hold its arguments.
    """

    parameter: str
    role: str
    channels_first: bool = False
    index: fx.Node | None = None
    other: fx.Node | None = None
    replay: Replay | None = None
    arguments: tuple[fx.Node, ...] = ()

    @property
    def operands(self) -> list[fx.Node]:
        """The nodes that a tap takes for it, in the order that `extract.taps` reads them."""
        return [node for node in (self.other, self.index) if node is not None] + list(self.arguments)


@dataclass(frozen=True)
class TapPlan:
    """A tap to insert behind `node`.

    Attributes:
        layer: the layer it belongs to.
        kind: the operation.
        members: what is read there; parameters, or values computed from parameters alone.
        parameters: the layer's parameters behind the members.
        shapes: the shape of every member.
        pulls: value -> how the gradients of its parameters follow from its own.
    """

    node: fx.Node
    layer: str
    kind: str
    members: tuple[Member, ...]
    parameters: tuple[str, ...]
    shapes: dict[str, torch.Size]
    pulls: dict[str, Pull]


@dataclass(frozen=True)
class _Source:
    """What a tap's operation combines with the examples: a parameter, or a value computed from parameters alone."""

    name: str
    shape: torch.Size
    node: fx.Node
    is_parameter: bool


@dataclass(frozen=True)
class _Read:
    """A source at its consumer, behind a chain of indexing operations."""

    source: _Source
    end: fx.Node
    chain: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Place:
    """A tap for one read: behind which node, of what kind, with which member."""

    node: fx.Node
    kind: str
    member: Member


class Tap(nn.Module):
    """Hands its first argument on; BackPACK keeps all of them for the extension.

    Attributes:
        members: what is read there; the further arguments are the `operands` of one after the other.
        shapes: the shape of every member.
        pulls: for members that are computed, how the gradients of their parameters follow.
    """

    def __init__(
        self, members: tuple[Member, ...], shapes: dict[str, torch.Size], pulls: Mapping[str, Pull] | None = None
    ) -> None:
        super().__init__()
        self.members = members
        self.shapes = shapes
        self.pulls = dict(pulls or {})

    def forward(self, output: Tensor, *extra: Tensor) -> Tensor:
        """The output itself."""
        return output.view_as(output)


def find_taps(
    graph: fx.Graph, root: nn.Module, wanted: Sequence[str], taken: Container[str]
) -> tuple[list[TapPlan], dict[str, str]]:
    """Taps for those of the wanted parameters that every reader allows one for, in forward order; why others have none.

    Inserts the index chains and the operands that the taps need; what stays unused is dead code. `taken` are the names
    that layers of other kinds have.
    """
    moving = moving_nodes(graph)
    reads: dict[_Read, list[str]] = {}
    seen: set[str] = set()
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target) in wanted:
            name = str(node.target)
            for read in _reads(root, name, node, moving):
                seen.add(name)
                reads.setdefault(read, []).append(name)
    places: dict[_Read, _Place | None] = {read: _place(graph, root, read) for read in reads}
    reasons = {name: UNREACHED for name in wanted if name not in seen}
    for read, names in reads.items():
        if places[read] is None:
            reasons |= {name: why_no_tap(read.end, read.source.node) for name in names if name not in reasons}
    kept = {read: [name for name in names if name not in reasons] for read, names in reads.items()}
    layers = _layers(kept, places, taken)
    plans: dict[tuple[fx.Node, str], TapPlan] = {}
    for read, names in kept.items():
        place = places[read]
        for layer in dict.fromkeys(layers[name] for name in names):
            assert place is not None
            own = tuple(name for name in names if layers[name] == layer)
            key = (place.node, layer)
            source = read.source
            pulls = {} if source.is_parameter else {source.name: pull_back(root, source.node, own)}
            plan = TapPlan(place.node, layer, place.kind, (place.member,), own, {source.name: source.shape}, pulls)
            known = plans.get(key)
            plans[key] = plan if known is None else _merged(known, plan)
    order = {node: index for index, node in enumerate(graph.nodes)}
    found = [plan for plan in plans.values() if not set(plan.parameters) & set(reasons)]
    return sorted(found, key=lambda plan: order[plan.node]), reasons


def _merged(first: TapPlan, second: TapPlan) -> TapPlan:
    return dataclasses.replace(
        first,
        members=(*first.members, *second.members),
        parameters=tuple(dict.fromkeys((*first.parameters, *second.parameters))),
        shapes=first.shapes | second.shapes,
        pulls=first.pulls | second.pulls,
    )


def _layers(
    kept: Mapping[_Read, Sequence[str]], places: Mapping[_Read, _Place | None], taken: Container[str]
) -> dict[str, str]:
    """Parameter -> its layer.

    The module of a norm, or of values computed on the way (with the bias beside a computed weight); otherwise the
    parameter itself.
    """
    layers: dict[str, str] = {}
    computed: set[str] = set()
    every = {name for names in kept.values() for name in names}
    for read, names in kept.items():
        place = places[read]
        kind = "" if place is None else place.kind
        for name in names:
            owner = _owner(name, every)
            if (not read.source.is_parameter or kind in NORM_KINDS) and owner and owner not in taken:
                layers[name] = owner
                computed |= {owner} if kind.startswith(COMPUTED) else set()
            else:
                layers.setdefault(name, name)
    beside = {name for name in layers if name.rpartition(".")[2] == "bias" and _owner(name, every) in computed}
    return layers | {name: _owner(name, every) for name in beside}


def _owner(name: str, names: Collection[str]) -> str:
    """The module that a parameter belongs to, seen through parametrizations; `model` for the root, if that is free."""
    path = (
        name.partition("parametrizations.")[0].rstrip(".") if "parametrizations." in name else name.rpartition(".")[0]
    )
    return path or ("" if any(other.startswith("model.") for other in names) else "model")


def _reads(root: nn.Module, name: str, start: fx.Node, moving: Container[fx.Node]) -> Iterator[_Read]:
    """Every place where the parameter, or a value computed from it alone, meets an example.

    A value that was spread over the batch meets the examples where that was done.
    """
    pending, seen = [start], {start}
    whole = _Source(name, root.get_buffer(name).shape, start, True)
    while pending:
        node = pending.pop(0)
        shape = _fixed_shape(node)
        alone = node is start or (shape is not None and stands_alone(node))
        source = (
            whole if node is start or shape is None or not alone else _Source(f"value {node.name}", shape, node, False)
        )
        before = () if alone else _between(start, node)
        walk: list[tuple[fx.Node, tuple[fx.Node, ...]]] = [(node, before)]
        while walk:
            shown, chain = walk.pop(0)
            for user in shown.users:
                if user.op == "call_function" and user.target in INDEXING and user.args[0] is shown:
                    walk.append((user, (*chain, user)))
                elif user in moving or (symbolic(shown) and user.op != "call_function"):
                    yield _Read(source, shown if user.op == "output" else user, chain)
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


def _place(graph: fx.Graph, root: nn.Module, read: _Read) -> _Place | None:
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
            return _Place(end, kind, Member(source.name, role, channels_first, index, other))
        # what was read itself: a token put before every example, or a table that is looked up
        spread = shown.target in (aten.expand.default, aten.repeat.default, aten.embedding.default)
        if chain and (spread or symbolic(shown)):
            return _Place(shown, "shift", Member(source.name, "shift", index=_index_chain(graph, root, source, chain)))
    plan = replay_of(root, source.node, chain, end)
    if plan is None:
        return None
    is_weight = not source.is_parameter and is_product(end)
    kind = f"{COMPUTED} {operation_name(end)}" if is_weight else operation_name(end)
    return _Place(plan.output, kind, Member(source.name, "replayed", replay=plan.replay, arguments=plan.arguments))


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


def _norm_place(graph: fx.Graph, name: str, end: fx.Node) -> _Place | None:
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
        return _Place(output, kind, Member(name, "shift", channels_first))
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
    return _Place(output, kind, Member(name, "scale", channels_first, other=plain))


def _parameter(node: fx.Node) -> str | None:
    while node.op == "call_function" and node.target in SAME_VALUES:
        node = node.args[0]  # type: ignore[assignment]
    return str(node.target) if node.op == "get_attr" else None


def _index_chain(graph: fx.Graph, root: nn.Module, source: _Source, chain: list[fx.Node]) -> fx.Node | None:
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
