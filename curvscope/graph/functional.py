"""The functional graph with its sites: what every later stage runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from curvscope.graph import sites as finding
from curvscope.graph.accounts import account
from curvscope.graph.biases import biases_of, site_bias, split_biases, with_addition
from curvscope.graph.operands import MatrixForm, Part
from curvscope.graph.products import Operation
from curvscope.graph.selection import layer_names, require_layers, require_trainable, selected
from curvscope.graph.sites import LayerSpec, Leaf, ParameterUse, Site
from curvscope.graph.tap import Tap, TapPlan
from curvscope.graph.taps import find_taps
from curvscope.graph.unlift import tidy, unlift
from curvscope.graph.weights import (
    Role,
    agreed_form,
    follows_examples,
    mixed_roles,
    readers_of,
    roles_of,
    stored,
    without_tables,
)


@dataclass
class Graph:
    """A model as one function of flat tensors, with its linear layers as sites.

    Attributes:
        run: the forward pass, `(*tensors) -> output`; root sites end in fresh leaves.
        layers: the layers to analyze, in forward order.
        uses: how every parameter is treated.
        parameters: every parameter by name, detached, in the run's dtype and on its device.
        requires_grad: whether the user trains it.
        origin: "exported", "exported (fixed batch size)" or "eager modules: <reason>".
        leaves: the root sites' outputs of the last forward pass, by target.
        rest: `(tensors, dL/df) -> gradients` of the trained parameters that belong to no layer.
        function: `(parameters, tensors) -> output`, the model without sites as a function of its parameters; those that
            are not given keep their values.
        plain: that model as an exported graph; None for eager modules.
        free: the names of those parameters.
        given_up: told the parameters of a layer that is dropped.
        routes: whether values decide how many rows some operation gets, as where a gate sends tokens to experts; None
            where only running it shows.
    """

    run: Callable[..., Tensor]
    layers: dict[str, LayerSpec]
    uses: list[ParameterUse]
    parameters: dict[str, Tensor]
    requires_grad: dict[str, bool]
    origin: str
    leaves: Callable[[], dict[str, Tensor]]
    rest: Callable[[Sequence[Tensor], Tensor], dict[str, Tensor]]
    function: Callable[[Mapping[str, Tensor], Sequence[Tensor]], Tensor]
    free: list[str] = field(default_factory=list)
    plain: fx.GraphModule | None = None
    given_up: Callable[[Sequence[str]], None] | None = None
    routes: bool | None = None

    def drop(self, layer: str, reason: str) -> None:
        """Give a layer up: its parameters count as uncovered, and `rest` has their gradients again."""
        lost = self.layers.pop(layer).trained
        self.free += lost
        if self.given_up is not None:
            self.given_up(lost)
        self.uses = [
            ParameterUse(use.parameter, "", use.count, "uncovered", reason) if use.parameter in lost else use
            for use in self.uses
        ]

    def chosen(self) -> list[LayerSpec]:
        """The layers that --layers and --skip keep."""
        return [layer for layer in self.layers.values() if layer.selected]

    def sites(self) -> list[Site]:
        """All sites of all layers, layer by layer."""
        return [site for layer in self.layers.values() for site in layer.sites]


def build(
    program: torch.export.ExportedProgram,
    *,
    device: torch.device,
    dtype: torch.dtype,
    dynamic: bool,
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Graph:
    """The exported program as a `Graph`, in `dtype` on `device`.

    Raises:
        ModelError: it has no linear layer with a parameter, or all of them are frozen.
        ModelError: `layers` and `skip` leave nothing.
    """
    module, parameters, requires_grad = unlift(program, device, dtype)
    graph = module.graph
    tidy(graph, device, dtype)
    plain = fx.GraphModule(module, copy.deepcopy(graph))
    shapes = {name: tensor.shape for name, tensor in parameters.items()}
    readers = readers_of(graph, set(parameters))
    operations = without_tables(finding.find_operations(graph, shapes), readers)
    weights = list(dict.fromkeys(operation.weight for operation in operations))
    names = layer_names(weights)
    require_trainable(weights, requires_grad)
    specs: dict[str, LayerSpec] = {}
    reasons: dict[str, tuple[str, str, str]] = {}  # parameter -> (layer, treatment, reason)
    blocked = mixed_roles(operations, readers)
    chosen: list[Operation] = []
    forms: dict[str, MatrixForm] = {}
    parts: dict[fx.Node, Part] = {}
    roles: dict[str, dict[fx.Node, Role]] = {}
    for weight in weights:
        calls = [operation for operation in operations if operation.weight == weight]
        agreed = None if weight in blocked else agreed_form(calls, shapes[weight])
        if agreed is None and weight not in blocked:
            agreed, found_roles = roles_of(calls, shapes[weight])
            roles |= {weight: found_roles} if found_roles else {}
        if not requires_grad[weight]:
            reasons[weight] = (names[weight], "frozen", "its weight does not require a gradient")
        elif agreed is not None and all(follows_examples(call, calls) for call in calls):
            forms[weight], found = agreed
            parts |= {call.node: part for call, part in zip(calls, found, strict=True)}
    chosen = [operation for operation in operations if operation.weight in forms]

    single = [operation for operation in chosen if operation.weight not in roles]
    biases = biases_of(single, forms, parts, requires_grad, readers, shapes)
    replaced: dict[fx.Node, Site] = {}
    outputs: dict[fx.Node, fx.Node] = {}
    roots: list[tuple[str, Leaf]] = []
    copies: dict[str, list[tuple[str, Operation]]] = {}  # weight -> where sites hold it
    for index, operation in enumerate(chosen):
        weight = operation.weight
        value = stored(operation, parameters[weight])
        copies.setdefault(weight, []).append((f"curvscope_site_{index}.weight", operation))
        own = biases.get(weight)
        bias = site_bias(operation, own, parameters, requires_grad)
        name = names[weight]
        spec = specs.get(name)
        if spec is None:
            form = forms[weight]
            spec = specs[name] = LayerSpec(name, operation.kind, weight, own, form.d_in, form.d_out, form)
            spec.groups = operation.groups
            spec.selected = selected(name, layers, skip)
            if weight in roles:
                spec.roles = {role.name: role.flipped for role in roles[weight].values()}
                spec.kind = "+".join(spec.roles)
        shared = finding.site_module(operation.kind, value, bias, operation.options, operation.groups)
        role = roles[weight][operation.node].name if weight in roles else ""
        site = Site(f"curvscope_site_{index}", name, operation.kind, shared, parts[operation.node], role)
        spec.sites.append(site)
        module.add_submodule(site.target, site.module)
        with graph.inserting_before(operation.node):
            # the producers may have become sites meanwhile
            given = operation.before(graph, *(outputs.get(x, x) for x in operation.inputs))
            called = graph.call_module(site.target, (given,))
            called.meta = dict(operation.node.meta)
            out = operation.after(graph, called)
            if operation.bias is not None and bias is None:
                out = with_addition(graph, out, outputs.get(operation.bias, operation.bias), operation.kind)
        operation.node.replace_all_uses_with(out)
        outputs[operation.node] = out
        graph.erase_node(operation.node)
        replaced[called] = site

    owned = {spec.weight for spec in specs.values()} | {spec.bias for spec in specs.values()}
    free = [name for name in parameters if requires_grad[name] and name not in owned and name not in reasons]
    split_biases(graph, free)
    plans, why = find_taps(graph, module, free, set(specs))
    behind: dict[fx.Node, fx.Node] = {}
    for plan in plans:
        node, site = _insert_tap(module, plan, behind.get(plan.node, plan.node), specs, shapes)
        behind[plan.node] = node
        replaced[node] = site
        specs[site.layer].selected = selected(site.layer, layers, skip)
    reasons |= {name: ("", "uncovered", reason) for name, reason in why.items()}
    require_layers(list(specs), layers, skip, list(requires_grad))

    for node, site in replaced.items():
        leaf = Leaf()
        roots.append((site.target, leaf))
        module.add_submodule(site.target + "_leaf", leaf)
        with graph.inserting_after(node):
            cut = graph.call_module(site.target + "_leaf", (node,))
        _replace_uses(node, cut)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    forward = list(dict.fromkeys(replaced[node].layer for node in graph.nodes if node in replaced))
    specs = {name: specs[name] for name in forward}

    uses = account(parameters, requires_grad, specs, reasons)

    def leaves() -> dict[str, Tensor]:
        return {target: leaf.value for target, leaf in roots if leaf.value is not None}

    owned |= {name for spec in specs.values() for name in spec.members}
    wanted = [name for name, trained in requires_grad.items() if trained and name not in owned and readers[name]]

    def rest(tensors: Sequence[Tensor], cotangent: Tensor) -> dict[str, Tensor]:
        if not wanted:
            return {}
        fresh = {name: parameters[name].detach().requires_grad_() for name in wanted}
        for _, leaf in roots:
            leaf.cut = False
        try:
            with torch.enable_grad():
                # the sites of a layer that was given up hold its weight themselves
                held = {
                    key: stored(operation, fresh[name]) for name in fresh for key, operation in copies.get(name, [])
                }
                output = torch.func.functional_call(module, fresh | held, tuple(tensors))
                if not output.requires_grad:
                    return {}
                found = torch.autograd.grad(output, list(fresh.values()), cotangent, allow_unused=True)
        finally:
            for _, leaf in roots:
                leaf.cut = True
        return {name: grad.detach() for name, grad in zip(fresh, found, strict=True) if grad is not None}

    # what the forward pass does not reach is no attribute of the graph's module
    held = {name for name, _ in (*plain.named_parameters(), *plain.named_buffers())}

    def function(given: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
        reached = {name: tensor for name, tensor in given.items() if name in held}
        return torch.func.functional_call(plain, reached, tuple(tensors))

    origin = "exported" if dynamic else "exported with a fixed batch size"
    whole = Graph(module, specs, uses, parameters, requires_grad, origin, leaves, rest, function, wanted, plain)
    values = [node.meta.get("val") for node in graph.nodes]
    whole.routes = any(isinstance(value, Tensor) and free_unbacked_symbols(value) for value in values)
    return whole


def _insert_tap(
    module: fx.GraphModule,
    plan: TapPlan,
    behind: fx.Node,
    specs: dict[str, LayerSpec],
    shapes: dict[str, torch.Size],
) -> tuple[fx.Node, Site]:
    """The tap's node and site, behind the operation or the last tap there; its layer made or extended."""
    name = plan.layer
    known = specs.get(name)
    if known is None:
        known = specs[name] = LayerSpec(name, plan.kind, plan.parameters[0], None, 0, 1, None, exact_only=True)
    own = {*known.members, *plan.parameters}
    known.members = {name: shape.numel() for name, shape in shapes.items() if name in own}
    known.d_in = sum(known.members.values())
    tap = Tap(plan.members, plan.shapes, plan.pulls)
    count = sum(len(spec.sites) for spec in specs.values())
    site = Site(f"curvscope_tap_{count}_{plan.node.name}", name, plan.kind, tap)
    known.sites.append(site)
    module.add_submodule(site.target, tap)
    extra = [operand for member in plan.members for operand in member.operands]
    graph = module.graph
    order = {node: position for position, node in enumerate(graph.nodes)}
    last = max([behind, *extra], key=lambda node: order[node])
    with graph.inserting_after(last):
        node = graph.call_module(site.target, (behind, *extra))
    node.meta = dict(plan.node.meta)
    # what comes before it are operands of taps
    behind.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node and order[user] > order[last])
    return node, site


def _replace_uses(node: fx.Node, stand_in: fx.Node) -> None:
    """Let everything that read the node read its stand-in, which itself goes on reading the node."""
    node.replace_all_uses_with(stand_in, delete_user_cb=lambda user: user is not stand_in)
