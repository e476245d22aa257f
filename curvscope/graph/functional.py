"""The functional graph with its sites: what every later stage runs."""

from __future__ import annotations

import copy
import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from curvscope.errors import ModelError
from curvscope.graph import sites as finding
from curvscope.graph import taps
from curvscope.graph.sites import LayerSpec, Leaf, ParameterUse, Site
from curvscope.graph.unlift import tidy, unlift

aten = torch.ops.aten


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
        free: the names of those parameters.
        given_up: told the parameters of a layer that is dropped.
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
    given_up: Callable[[Sequence[str]], None] | None = None

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


def layer_names(weights: Sequence[str]) -> dict[str, str]:
    """Weight name -> layer name: its module's path, or its own where that module owns several; `model` at the root."""
    owners = Counter(weight.rpartition(".")[0] for weight in weights)
    names = {}
    for weight in weights:
        owner = weight.rpartition(".")[0]
        names[weight] = weight if owners[owner] > 1 else owner or "model"
    return names


def selected(name: str, keep: Sequence[str], skip: Sequence[str]) -> bool:
    """Whether the globs keep this layer."""
    kept = not keep or any(fnmatch.fnmatchcase(name, pattern) for pattern in keep)
    return kept and not any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)


def require_layers(found: Sequence[str], keep: Sequence[str], skip: Sequence[str]) -> None:
    """Refuse a selection that leaves nothing.

    Raises:
        ModelError: the globs match none of the layers found.
    """
    if found and not any(selected(name, keep, skip) for name in found):
        shown = ", ".join(found[:8]) + (f", ... ({len(found)} in all)" if len(found) > 8 else "")
        raise ModelError(
            "No layer is left to analyze: the patterns match none.",
            where=f"--layers {' '.join(keep) or '*'}" + (f" --skip {' '.join(skip)}" if skip else ""),
            remedy=f"The model's linear layers are: {shown}.",
        )


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
    readers = _readers(graph, set(parameters))
    operations = _without_tables(finding.find_operations(graph, set(parameters)), readers)
    weights = list(dict.fromkeys(operation.weight for operation in operations))
    names = layer_names(weights)
    require_trainable(weights, requires_grad)
    specs: dict[str, LayerSpec] = {}
    reasons: dict[str, tuple[str, str, str]] = {}  # parameter -> (layer, treatment, reason)
    blocked = _mixed_roles(operations, readers)
    chosen = []
    constant = {operation.weight for operation in operations if not _depends_on_inputs(operation.node)}
    for operation in operations:
        weight, name = operation.weight, names[operation.weight]
        if weight in blocked:
            reasons[weight] = ("", "uncovered", blocked[weight])
        elif not requires_grad[weight]:
            reasons[weight] = (name, "frozen", "its weight does not require a gradient")
        elif weight in constant:
            reasons[weight] = (
                "",
                "uncovered",
                "its rows depend on no example; its exact block is not computed yet",
            )
        else:
            chosen.append(operation)

    roles = _roles(chosen)
    biases = _biases(
        [operation for operation in chosen if operation.weight not in roles], parameters, requires_grad, readers, shapes
    )
    replaced: dict[fx.Node, Site] = {}
    outputs: dict[fx.Node, fx.Node] = {}
    roots: list[tuple[str, Leaf]] = []
    copies: dict[str, list[tuple[str, bool]]] = {}  # weight -> where sites hold it, and whether transposed
    for index, operation in enumerate(chosen):
        weight = operation.weight
        value = parameters[weight]
        turned = operation.kind == "linear" and operation.transposed
        if turned:
            value = value.t()
        copies.setdefault(weight, []).append((f"curvscope_site_{index}.weight", turned))
        bias_tensor = _plain_bias(operation.bias, parameters, requires_grad, biases.get(weight))
        site_bias = bias_tensor if isinstance(bias_tensor, Tensor) else None
        name = names[weight]
        spec = specs.get(name)
        if spec is None:
            d_out = finding.output_size(operation.kind, value.shape)
            d_in = value.numel() // d_out
            spec = specs[name] = LayerSpec(
                name, operation.kind, weight, biases.get(weight), d_in, d_out, operation.transposed
            )
            spec.groups = operation.options.get("groups", 1)
            spec.selected = selected(name, layers, skip)
            if weight in roles:
                spec.roles = {role: flipped for _, _, role, flipped in roles[weight]}
                spec.kind = "+".join(spec.roles)
        shared = finding.site_module(operation.kind, value, site_bias, operation.options)
        role = next((known[2] for known in roles.get(weight, []) if known[:2] == _form(operation)), "")
        site = Site(f"curvscope_site_{index}", name, operation.kind, shared, role)
        spec.sites.append(site)
        module.add_submodule(site.target, site.module)
        with graph.inserting_before(operation.node):
            x = outputs.get(operation.x, operation.x)  # its producer may have become a site meanwhile
            if operation.x_transposed:
                x = graph.call_function(aten.transpose.int, (x, -1, -2))
            called = graph.call_module(site.target, (x,))
            called.meta = dict(operation.node.meta)
            out = called
            if bias_tensor is _COMPUTED:
                added = outputs.get(operation.bias, operation.bias)
                out = graph.call_function(aten.add.Tensor, (out, added))
            if operation.x_transposed:
                out = graph.call_function(aten.transpose.int, (out, -1, -2))
        operation.node.replace_all_uses_with(out)
        outputs[operation.node] = out
        graph.erase_node(operation.node)
        replaced[called] = site

    owned = {spec.weight for spec in specs.values()} | {spec.bias for spec in specs.values()}
    free = [name for name in parameters if requires_grad[name] and name not in owned and name not in reasons]
    for plan in list(taps.find_taps(graph, module, free)):
        tapped = _insert_tap(module, plan, specs, shapes)
        if tapped is not None:
            node, site = tapped
            replaced[node] = site
            specs[site.layer].selected = selected(site.layer, layers, skip)
    require_layers(list(specs), layers, skip)

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

    uses = _account(parameters, requires_grad, specs, reasons, readers)

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
                    key: fresh[name].t() if turned else fresh[name]
                    for name in fresh
                    for key, turned in copies.get(name, [])
                }
                output = torch.func.functional_call(module, fresh | held, tuple(tensors))
                if not output.requires_grad:
                    return {}
                found = torch.autograd.grad(output, list(fresh.values()), cotangent, allow_unused=True)
        finally:
            for _, leaf in roots:
                leaf.cut = True
        return {name: grad.detach() for name, grad in zip(fresh, found, strict=True) if grad is not None}

    def function(given: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
        return torch.func.functional_call(plain, dict(given), tuple(tensors))

    origin = "exported" if dynamic else "exported with a fixed batch size"
    return Graph(module, specs, uses, parameters, requires_grad, origin, leaves, rest, function, wanted)


def _insert_tap(
    module: fx.GraphModule, plan: taps.TapPlan, specs: dict[str, LayerSpec], shapes: dict[str, torch.Size]
) -> tuple[fx.Node, Site] | None:
    """The tap's node and site, its layer made or extended; None where a layer of another kind has its name."""
    owner = plan.members[0].parameter.rpartition(".")[0]
    name = owner if plan.kind not in ("scale", "shift") and owner else plan.members[0].parameter
    known = specs.get(name)
    if known is not None and not known.exact_only:
        return None
    members = {member.parameter: shapes[member.parameter].numel() for member in plan.members}
    if known is None:
        first = plan.members[0].parameter
        known = specs[name] = LayerSpec(name, plan.kind, first, None, 0, 1, False, exact_only=True)
    known.members |= members
    known.d_in = sum(known.members.values())
    tap = taps.Tap(plan.members, {member.parameter: shapes[member.parameter] for member in plan.members})
    count = sum(len(spec.sites) for spec in specs.values())
    site = Site(f"curvscope_tap_{count}_{plan.node.name}", name, plan.kind, tap)
    known.sites.append(site)
    module.add_submodule(site.target, tap)
    extra = [plan.other] if plan.other is not None else []
    extra += [member.index for member in plan.members if member.index is not None]
    graph = module.graph
    order = {node: position for position, node in enumerate(graph.nodes)}
    with graph.inserting_after(max([plan.node, *extra], key=lambda node: order[node])):
        node = graph.call_module(site.target, (plan.node, *extra))
    node.meta = dict(plan.node.meta)
    _replace_uses(plan.node, node)
    return node, site


def _replace_uses(node: fx.Node, stand_in: fx.Node) -> None:
    """Let everything that read the node read its stand-in, which itself goes on reading the node."""
    node.replace_all_uses_with(stand_in, delete_user_cb=lambda user: user is not stand_in)


class _Computed:
    """A bias that is neither absent nor a tensor the graph holds."""


_COMPUTED = _Computed()


def _plain_bias(
    bias: Any, parameters: dict[str, Tensor], requires_grad: dict[str, bool], own: str | None
) -> Tensor | _Computed | None:
    """The bias as a tensor the site can hold; `_COMPUTED` where it has to stay an addition in the graph.

    That is a bias that is no parameter, and a trained one that is not the layer's own: its gradient is wanted.
    """
    if bias is None:
        return None
    found = finding.parameter_of(bias, set(parameters))
    if found is not None and parameters[found[0]].ndim == 1 and (found[0] == own or not requires_grad[found[0]]):
        return parameters[found[0]]
    return _COMPUTED


def require_trainable(weights: Sequence[str], requires_grad: dict[str, bool]) -> None:
    """Refuse a model without a linear layer that is trained.

    Raises:
        ModelError: there are no linear layers, or every one of them is frozen.
    """
    if not weights:
        raise ModelError(
            "The model has no linear layer whose weight is a parameter.",
            where=f"{len(requires_grad)} parameters",
            remedy="curvscope analyzes nn.Linear, nn.Conv1d/2d/3d, nn.Embedding and products with a parameter; this "
            "model has none.",
        )
    if not any(requires_grad[weight] for weight in weights):
        raise ModelError(
            "Every linear layer is frozen: none of their weights requires a gradient.",
            where=f"{len(weights)} weights, the first is {weights[0]}",
            remedy="Set requires_grad_(True) on the parameters that are trained before saving or analyzing.",
        )


def _readers(graph: fx.Graph, parameters: set[str]) -> dict[str, list[fx.Node]]:
    """Parameter name -> the operations that read it, seen through aliases and transposes."""
    readers: dict[str, list[fx.Node]] = {name: [] for name in parameters}
    through = (*finding.SAME_VALUES, *finding.TRANSPOSES)
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) in parameters:
            pending = list(node.users)
            while pending:
                user = pending.pop(0)
                if user.op == "call_function" and user.target in through:
                    pending += list(user.users)
                elif user.op != "output":
                    readers[str(node.target)].append(user)
    return readers


def _without_tables(operations: Sequence[Any], readers: dict[str, list[fx.Node]]) -> list[Any]:
    """The operations without look-ups in weights that nothing but taps can serve.

    Those are tables of positions, whose rows belong to no example, and parameters that are also read otherwise.
    """
    nodes = {operation.node for operation in operations}
    linear = {operation.weight for operation in operations if operation.kind != "embedding"}
    tables = {
        operation.weight
        for operation in operations
        if operation.weight not in linear
        and (not _depends_on_inputs(operation.node) or not nodes.issuperset(readers[operation.weight]))
    }
    return [operation for operation in operations if operation.weight not in tables]


def _form(operation: Any) -> tuple[str, bool]:
    return operation.kind, operation.transposed


def _roles(operations: Sequence[Any]) -> dict[str, list[tuple[str, bool, str, bool]]]:
    """Weights used in several ways -> (kind, transposed, role, whether that is the transpose of the first use)."""
    forms: dict[str, list[tuple[str, bool]]] = {}
    for operation in operations:
        known = forms.setdefault(operation.weight, [])
        if _form(operation) not in known:
            known.append(_form(operation))
    return {
        weight: [
            (kind, transposed, finding.role_name(kind, transposed, [k for k, _ in known]), transposed != known[0][1])
            for kind, transposed in known
        ]
        for weight, known in forms.items()
        if len(known) > 1
    }


def _mixed_roles(operations: Sequence[Any], readers: dict[str, list[fx.Node]]) -> dict[str, str]:
    """Weights that are read by something else than linear operations, or as kernels of two kinds of convolution."""
    blocked = {}
    nodes = {operation.node for operation in operations}
    forms: dict[str, set[tuple[str, bool]]] = {}
    for operation in operations:
        forms.setdefault(operation.weight, set()).add(_form(operation))
        others = [reader for reader in readers[operation.weight] if reader not in nodes]
        if others:
            other = str(others[0].target).removeprefix("aten.").split(".")[0]
            blocked[operation.weight] = f"tied in two roles (also read by {other}): not covered yet"
    for weight, seen in forms.items():
        kinds = sorted({kind for kind, _ in seen})
        if len(seen) > 1 and not {"linear", "embedding"}.issuperset(kinds):
            blocked.setdefault(weight, f"tied in two roles ({' and '.join(kinds)}): not covered yet")
    return blocked


def _depends_on_inputs(node: fx.Node) -> bool:
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


def _biases(
    operations: Sequence[Any],
    parameters: dict[str, Tensor],
    requires_grad: dict[str, bool],
    readers: dict[str, list[fx.Node]],
    shapes: dict[str, torch.Size],
) -> dict[str, str]:
    """Weight -> the bias that trains with it: at every site of the weight the same one, and nowhere else."""
    per_weight: dict[str, list[str | None]] = {}
    names = set(parameters)
    for operation in operations:
        found = finding.parameter_of(operation.bias, names)
        bias = found[0] if found is not None else None
        if operation.bias is None and not operation.x_transposed and operation.kind != "embedding":
            d_out = shapes[operation.weight][1 if operation.transposed else 0]
            bias = finding.added_bias(operation.node, operation.kind, d_out, names, shapes)
        per_weight.setdefault(operation.weight, []).append(bias)
    chosen = {}
    for weight, biases in per_weight.items():
        bias = biases[0]
        same = bias is not None and set(biases) == {bias}
        if same and bias is not None and requires_grad[bias] and len(readers[bias]) == len(biases):
            chosen[weight] = bias
    return chosen


def _account(
    parameters: dict[str, Tensor],
    requires_grad: dict[str, bool],
    specs: dict[str, LayerSpec],
    reasons: dict[str, tuple[str, str, str]],
    readers: dict[str, list[fx.Node]],
) -> list[ParameterUse]:
    """One `ParameterUse` for every parameter."""
    owner = {spec.weight: spec.name for spec in specs.values()}
    owner |= {name: spec.name for spec in specs.values() for name in spec.members}
    owner |= {spec.bias: spec.name for spec in specs.values() if spec.bias is not None}
    uses = []
    for name, tensor in parameters.items():
        if name in owner and not specs[owner[name]].selected:
            uses.append(ParameterUse(name, owner[name], tensor.numel(), "uncovered", "left out by --layers / --skip"))
        elif name in owner:
            treatment = "exact_only" if specs[owner[name]].exact_only else "kronecker"
            uses.append(ParameterUse(name, owner[name], tensor.numel(), treatment))
        elif name in reasons:
            layer, treatment, reason = reasons[name]
            uses.append(ParameterUse(name, layer, tensor.numel(), treatment, reason))
        elif not requires_grad[name]:
            uses.append(ParameterUse(name, "", tensor.numel(), "frozen", "it does not require a gradient"))
        else:
            uses.append(ParameterUse(name, "", tensor.numel(), "uncovered", finding.why_uncovered(readers[name])))
    return uses
