"""Parameters without a Kronecker form: norms' weights, and parameters that are added or multiplied.

Such a parameter reaches the graph through indexing alone (views, slices, tables of positions) and is then combined
element by element. A tap behind that operation sees its output gradient, from which the parameter's own gradient for
every example follows; with it comes the exact block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Container, Mapping, Sequence

from torch import fx, nn

from curvscope.graph.reasons import UNREACHED, why_no_tap
from curvscope.graph.still import moving_nodes, pull_back
from curvscope.graph.tap import TapPlan
from curvscope.graph.tap_places import COMPUTED, NORM_KINDS, Place, Read, place_of, reads_of


def find_taps(
    graph: fx.Graph, root: nn.Module, wanted: Sequence[str], taken: Container[str]
) -> tuple[list[TapPlan], dict[str, str]]:
    """Taps for those of the wanted parameters that every reader allows one for, in forward order; why others have none.

    Inserts the index chains and the operands that the taps need; what stays unused is dead code. `taken` are the names
    that layers of other kinds have.
    """
    moving = moving_nodes(graph)
    reads: dict[Read, list[str]] = {}
    seen: set[str] = set()
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target) in wanted:
            name = str(node.target)
            for read in reads_of(root, name, node, moving):
                seen.add(name)
                reads.setdefault(read, []).append(name)
    places: dict[Read, Place | None] = {read: place_of(graph, root, read) for read in reads}
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
    kept: Mapping[Read, Sequence[str]], places: Mapping[Read, Place | None], taken: Container[str]
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
