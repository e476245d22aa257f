"""How every parameter is treated."""

from __future__ import annotations

from torch import Tensor

from curvscope.graph.reasons import UNREACHED, why_exact_only
from curvscope.graph.sites import LayerSpec, ParameterUse


def account(
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
