"""The fallback where export refuses a model: its own nn.Linear, nn.ConvNd and nn.Embedding modules as sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvscope.graph.export import FlatInputs, output_tensor
from curvscope.graph.functional import Graph
from curvscope.graph.operands import stored_form
from curvscope.graph.reasons import UNREACHED
from curvscope.graph.selection import layer_names, require_layers, require_trainable, selected
from curvscope.graph.sites import LayerSpec, Leaf, ParameterUse, Site, role_name, site_module

KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Embedding: "embedding",
}
OPTIONS = ("stride", "padding", "dilation", "groups", "output_padding")


class _Calls(nn.Module):
    """Stands where the model's own module stood: one site a call, each ending in a leaf where nothing came before."""

    def __init__(self, sites: Sequence[nn.Module], added: Tensor | None) -> None:
        super().__init__()
        self.sites = nn.ModuleList(sites)
        self.added = [added]  # a bias that is no part of the layer, kept out of the parameters
        self.leaves = [Leaf() for _ in sites]
        self.calls = 0
        self.cut = True
        self.read = False

    def __getattr__(self, name: str) -> Any:
        """Attributes of the module that stood here; reading its weight is a use that no site sees."""
        if name == "sites":
            return super().__getattr__(name)
        if name in ("weight", "bias"):
            self.read = True
        return getattr(self.sites[0], name)

    def forward(self, tensor: Tensor) -> Tensor:
        index = self.calls
        self.calls += 1
        site, leaf = self.sites[index], self.leaves[index]
        # A leaf of an earlier pass must not be taken for one of this pass.
        leaf.value = None
        output: Tensor = site(tensor)
        if self.cut and not tensor.requires_grad:
            output = leaf(output)
        if self.added[0] is not None:
            return output + self.added[0]
        # In-place operations on leaves and on what a hooked module returns are refused by autograd: hand out a copy.
        return output.clone()


def build_eager(
    twin: nn.Module,
    flat: FlatInputs,
    tensors: Sequence[Tensor],
    reason: str,
    *,
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> Graph:
    """A `Graph` over the model's own linear modules.

    `twin` is a shadow of the user's model (it is rewritten in place); `tensors` are run once to count the calls of each
    module. Functional uses of a parameter are not seen as layers here: such parameters count as uncovered.

    Raises:
        ModelError: no plain linear module, or all of them are frozen.
        UsageError: the globs leave nothing.
    """
    parameters = {name: parameter.detach() for name, parameter in twin.named_parameters()}
    requires_grad = {name: parameter.requires_grad for name, parameter in twin.named_parameters()}
    by_identity = {id(parameter): name for name, parameter in twin.named_parameters()}
    own = dict(twin.named_parameters())
    original = twin
    found = {name: module for name, module in twin.named_modules() if type(module) in KINDS and _coverable(module)}
    counts = _count_calls(twin, flat, tensors, found)
    used = {name: module for name, module in found.items() if counts[name]}
    weights = list(dict.fromkeys(by_identity[id(module.weight)] for module in used.values()))
    require_trainable(weights, requires_grad)
    names = layer_names(weights)
    require_layers([names[w] for w in weights if requires_grad[w]], layers, skip, list(requires_grad))

    specs: dict[str, LayerSpec] = {}
    standing: list[_Calls] = []
    weight_of: list[str] = []
    stood: dict[str, nn.Module] = {}
    uses_of = _uses_of(used, by_identity)
    # a weight that a module of yet another kind holds as well
    tied = {
        by_identity[id(parameter)]
        for path, module in twin.named_modules()
        if path not in used
        for parameter in module.parameters(recurse=False)
        if by_identity[id(parameter)] in names
    }
    tied |= {weight for weight, kinds in uses_of.items() if len(kinds) > 1 and {*kinds} != {"linear", "embedding"}}
    for path, module in used.items():
        weight = by_identity[id(module.weight)]
        if not requires_grad[weight]:
            continue
        name, kind = names[weight], KINDS[type(module)]
        own_bias = getattr(module, "bias", None)
        bias = by_identity[id(own_bias)] if own_bias is not None else None
        spec = specs.get(name)
        if spec is None:
            trained = bias if bias is not None and requires_grad[bias] and len(uses_of[weight]) == 1 else None
            transposed = "transpose" in kind or kind == "embedding"
            groups = getattr(module, "groups", 1)
            form = stored_form(module.weight.shape, transposed=transposed, groups=groups)
            spec = specs[name] = LayerSpec(name, kind, weight, trained, form.d_in, form.d_out, form)
            spec.groups = groups
            spec.selected = selected(name, layers, skip)
            if len(uses_of[weight]) > 1:
                spec.roles = {role_name(each, False, uses_of[weight]): each != kind for each in uses_of[weight]}
                spec.kind = "+".join(spec.roles)
        role = role_name(kind, False, uses_of[weight]) if spec.roles else ""
        options = {key: getattr(module, key) for key in _options(kind)}
        added = module.bias if spec.roles and bias is not None and requires_grad[bias] else None
        held = None if bias is None or added is not None else module.bias.detach()
        sites = []
        for _ in range(counts[path]):
            target = f"curvscope_site_{sum(len(s.sites) for s in specs.values())}"
            shared = site_module(kind, module.weight.detach(), held, options)
            site = Site(target, name, kind, shared, role=role)
            spec.sites.append(site)
            sites.append(shared)
        calls = _Calls(sites, added)
        standing.append(calls)
        weight_of.append(weight)
        stood[path] = module
        if path:
            _put(twin, path, calls)
        else:
            twin = calls
    for parameter in twin.parameters():
        parameter.requires_grad_(False)

    def run(*given: Tensor) -> Tensor:
        for calls in standing:
            calls.calls = 0
        args, kwargs = flat.rebuild(tuple(given))
        return output_tensor(twin(*args, **kwargs))

    def leaves() -> dict[str, Tensor]:
        # those of a layer that was given up have no target
        targets = {id(site.module): site.target for spec in specs.values() for site in spec.sites}
        return {
            targets[id(site)]: leaf.value
            for calls in standing
            for site, leaf in zip(calls.sites, calls.leaves, strict=True)
            if leaf.value is not None and id(site) in targets
        }

    with torch.no_grad():
        run(*tensors)
    lost = {weight for weight, calls in zip(weight_of, standing, strict=True) if calls.read} | tied
    for (path, module), weight in zip(list(stood.items()), weight_of, strict=True):
        if weight in lost:
            _put(twin, path, module.requires_grad_(False))
            specs.pop(names[weight], None)
    standing[:] = [calls for weight, calls in zip(weight_of, standing, strict=True) if weight not in lost]
    require_layers(list(specs), layers, skip, list(requires_grad))
    owned = {spec.weight for spec in specs.values()} | {spec.bias for spec in specs.values()}
    wanted = {name: p for name, p in own.items() if requires_grad[name] and name not in owned}

    def rest(given: Sequence[Tensor], cotangent: Tensor) -> dict[str, Tensor]:
        if not wanted:
            return {}
        try:
            for parameter in wanted.values():
                parameter.requires_grad_(True)
            for calls in standing:
                calls.cut = False
            with torch.enable_grad():
                output = run(*given)
                if not output.requires_grad:
                    return {}
                grads = torch.autograd.grad(output, list(wanted.values()), cotangent, allow_unused=True)
        finally:
            for parameter in wanted.values():
                parameter.requires_grad_(False)
            for calls in standing:
                calls.cut = True
        return {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}

    def function(given: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> Tensor:
        places = [path for path in stood if path]
        standing_there = {path: original.get_submodule(path) for path in places}
        try:
            for path in places:
                _put(original, path, stood[path])
            args, kwargs = flat.rebuild(tuple(tensors))
            return output_tensor(torch.func.functional_call(original, dict(given), args, kwargs))
        finally:
            for path in places:
                _put(original, path, standing_there[path])

    idle = [module for name, module in found.items() if not counts[name]]
    uncalled = {by_identity[id(parameter)] for module in idle for parameter in module.parameters()}
    uses = []
    owner = {name: spec for spec in specs.values() for name in (spec.weight, spec.bias) if name is not None}
    for name, tensor in parameters.items():
        count = tensor.numel()
        if name in owner and owner[name].selected:
            uses.append(ParameterUse(name, owner[name].name, count, "kronecker"))
        elif name in owner:
            uses.append(ParameterUse(name, owner[name].name, count, "uncovered", "left out by --layers / --skip"))
        elif not requires_grad[name]:
            uses.append(ParameterUse(name, "", count, "frozen", "it does not require a gradient"))
        else:
            why = "no plain nn.Linear, nn.ConvNd or nn.Embedding of a model that could not be exported"
            if name in uncalled:
                why = UNREACHED
            if name in lost:
                why = "its weight is also read outside its own forward pass: not covered without export"
            uses.append(ParameterUse(name, "", count, "uncovered", why))

    def given_up(lost: Sequence[str]) -> None:
        for path, module in stood.items():
            if by_identity[id(module.weight)] in lost:
                _put(twin, path, module.requires_grad_(False))
        wanted.update({name: own[name] for name in lost})

    origin = f"eager modules, export failed ({reason})"
    return Graph(
        run, specs, uses, parameters, requires_grad, origin, leaves, rest, function, list(wanted), given_up=given_up
    )


def _uses_of(used: Mapping[str, nn.Module], by_identity: Mapping[int, str]) -> dict[str, list[str]]:
    """Weight -> the kinds of its modules, each once."""
    kinds: dict[str, list[str]] = {}
    for module in used.values():
        known = kinds.setdefault(by_identity[id(module.weight)], [])
        if KINDS[type(module)] not in known:
            known.append(KINDS[type(module)])
    return kinds


def _options(kind: str) -> tuple[str, ...]:
    """The settings that a module of this kind shares with its site."""
    if kind == "embedding":
        return ("padding_idx",)
    return () if kind == "linear" else OPTIONS if "transpose" in kind else OPTIONS[:-1]


def _put(twin: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at a dotted path."""
    parent, _, last = path.rpartition(".")
    setattr(twin.get_submodule(parent), last, module)


def _coverable(module: Any) -> bool:
    """Zero padding only (others pad outside the operation), and no embedding that rescales its rows."""
    return getattr(module, "padding_mode", "zeros") == "zeros" and getattr(module, "max_norm", None) is None


def _count_calls(
    twin: nn.Module, flat: FlatInputs, tensors: Sequence[Tensor], found: dict[str, nn.Module]
) -> dict[str, int]:
    """How often one forward pass calls each module."""
    counts = dict.fromkeys(found, 0)
    handles = []

    def counter(name: str) -> Any:
        def count(*_: Any) -> None:
            counts[name] += 1

        return count

    try:
        for name, module in found.items():
            handles.append(module.register_forward_hook(counter(name)))
        args, kwargs = flat.rebuild(tuple(tensors))
        with torch.no_grad():
            twin(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return counts
