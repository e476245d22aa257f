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
from curvscope.graph.operands import SAME_VALUES, VIEWS, WHOLE, MatrixForm, Part, matrix_form, operand_of
from curvscope.graph.products import Operation
from curvscope.graph.reasons import UNREACHED, why_exact_only
from curvscope.graph.sites import LayerSpec, Leaf, ParameterUse, Site
from curvscope.graph.still import moving_nodes, reads_any, symbolic
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
        plain: that model as an exported graph; None for eager modules.
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
    plain: fx.GraphModule | None = None
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
    operations = _without_tables(finding.find_operations(graph, shapes), readers)
    weights = list(dict.fromkeys(operation.weight for operation in operations))
    names = layer_names(weights)
    require_trainable(weights, requires_grad)
    specs: dict[str, LayerSpec] = {}
    reasons: dict[str, tuple[str, str, str]] = {}  # parameter -> (layer, treatment, reason)
    blocked = _mixed_roles(operations, readers)
    chosen: list[Operation] = []
    forms: dict[str, MatrixForm] = {}
    parts: dict[fx.Node, Part] = {}
    roles: dict[str, dict[fx.Node, Role]] = {}
    for weight in weights:
        calls = [operation for operation in operations if operation.weight == weight]
        agreed = None if weight in blocked else _agreed(calls, shapes[weight])
        if agreed is None and weight not in blocked:
            agreed, found_roles = _roles(calls, shapes[weight])
            roles |= {weight: found_roles} if found_roles else {}
        if not requires_grad[weight]:
            reasons[weight] = (names[weight], "frozen", "its weight does not require a gradient")
        elif agreed is not None and all(_follows_examples(call, calls) for call in calls):
            forms[weight], found = agreed
            parts |= {call.node: part for call, part in zip(calls, found, strict=True)}
    chosen = [operation for operation in operations if operation.weight in forms]

    single = [operation for operation in chosen if operation.weight not in roles]
    biases = _biases(single, forms, parts, requires_grad, readers, shapes)
    replaced: dict[fx.Node, Site] = {}
    outputs: dict[fx.Node, fx.Node] = {}
    roots: list[tuple[str, Leaf]] = []
    copies: dict[str, list[tuple[str, Operation]]] = {}  # weight -> where sites hold it
    for index, operation in enumerate(chosen):
        weight = operation.weight
        value = _stored(operation, parameters[weight])
        copies.setdefault(weight, []).append((f"curvscope_site_{index}.weight", operation))
        own = biases.get(weight)
        bias = _site_bias(operation, own, parameters, requires_grad)
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
                out = _added(graph, out, outputs.get(operation.bias, operation.bias), operation.kind)
        operation.node.replace_all_uses_with(out)
        outputs[operation.node] = out
        graph.erase_node(operation.node)
        replaced[called] = site

    owned = {spec.weight for spec in specs.values()} | {spec.bias for spec in specs.values()}
    free = [name for name in parameters if requires_grad[name] and name not in owned and name not in reasons]
    _split_biases(graph, free)
    plans, why = taps.find_taps(graph, module, free, set(specs))
    behind: dict[fx.Node, fx.Node] = {}
    for plan in plans:
        node, site = _insert_tap(module, plan, behind.get(plan.node, plan.node), specs, shapes)
        behind[plan.node] = node
        replaced[node] = site
        specs[site.layer].selected = selected(site.layer, layers, skip)
    reasons |= {name: ("", "uncovered", reason) for name, reason in why.items()}
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

    uses = _account(parameters, requires_grad, specs, reasons)

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
                    key: _stored(operation, fresh[name]) for name in fresh for key, operation in copies.get(name, [])
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
    return Graph(module, specs, uses, parameters, requires_grad, origin, leaves, rest, function, wanted, plain)


def _insert_tap(
    module: fx.GraphModule,
    plan: taps.TapPlan,
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
    tap = taps.Tap(plan.members, plan.shapes, plan.pulls)
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


def _split_biases(graph: fx.Graph, free: Sequence[str]) -> None:
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


def _replace_uses(node: fx.Node, stand_in: fx.Node) -> None:
    """Let everything that read the node read its stand-in, which itself goes on reading the node."""
    node.replace_all_uses_with(stand_in, delete_user_cb=lambda user: user is not stand_in)


def _follows_examples(call: Operation, calls: Sequence[Operation]) -> bool:
    """Whether the operation's rows belong to examples: they depend on the inputs, or run along the examples' axis.

    A recurrent layer's first step takes zeros, one row for each example.
    """
    if _depends_on_inputs(call.node) or symbolic(call.node):
        return True
    return any(_depends_on_inputs(other.node) and str(_shape(other.node)) == str(_shape(call.node)) for other in calls)


def _shape(node: fx.Node) -> list[Any]:
    return list(node.meta["val"].shape)


def _agreed(calls: Sequence[Operation], shape: torch.Size) -> tuple[MatrixForm, list[Part]] | None:
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


def _stored(operation: Operation, value: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class Role:
    """What an operation uses its weight as, and whether that is the transpose of the first operation's matrix."""

    name: str
    flipped: bool


def _roles(
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


def _without_tables(operations: Sequence[Operation], readers: dict[str, list[fx.Node]]) -> list[Operation]:
    """The operations without look-ups in weights that nothing but taps can serve.

    Those are tables of positions, whose rows belong to no example, and parameters that are also read otherwise.
    """
    nodes = {operation.node for operation in operations}
    linear = {operation.weight for operation in operations if operation.kind != "embedding"}
    tables = {
        operation.weight
        for operation in operations
        if operation.weight not in linear
        and (not _follows_examples(operation, [operation]) or not nodes.issuperset(readers[operation.weight]))
    }
    return [operation for operation in operations if operation.weight not in tables]


def _site_bias(
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


def _added(graph: fx.Graph, out: fx.Node, bias: Any, kind: str) -> fx.Node:
    """The output with a bias that stays an addition."""
    if kind != "linear":
        bias = graph.call_function(aten.reshape.default, (bias, [-1] + [1] * finding.spatial_dims(kind)))
    return graph.call_function(aten.add.Tensor, (out, bias))


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


def _mixed_roles(operations: Sequence[Operation], readers: dict[str, list[fx.Node]]) -> set[str]:
    """Weights that are read by something else than linear operations, too."""
    nodes = {operation.node for operation in operations}
    return {operation.weight for operation in operations if not nodes.issuperset(readers[operation.weight])}


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


def _account(
    parameters: dict[str, Tensor],
    requires_grad: dict[str, bool],
    specs: dict[str, LayerSpec],
    reasons: dict[str, tuple[str, str, str]],
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
            spec = specs[owner[name]]
            why = why_exact_only(spec.kind, name) if spec.exact_only else ""
            uses.append(ParameterUse(name, owner[name], tensor.numel(), treatment, why))
        elif name in reasons:
            layer, treatment, reason = reasons[name]
            uses.append(ParameterUse(name, layer, tensor.numel(), treatment, reason))
        elif not requires_grad[name]:
            uses.append(ParameterUse(name, "", tensor.numel(), "frozen", "it does not require a gradient"))
        else:
            uses.append(ParameterUse(name, "", tensor.numel(), "uncovered", UNREACHED))
    return uses
