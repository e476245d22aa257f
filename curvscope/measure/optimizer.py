"""What a checkpoint's optimizer says of damping: its own value and its L2 weight decay, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

from curvscope.graph.functional import Graph
from curvscope.graph.sites import LayerSpec
from curvscope.load.decay import l2_decay, lost_dampings, own_dampings
from curvscope.load.problem import OptimizerState
from curvscope.measure.damping import DampingWishes
from curvscope.settings import SQUARED, Settings

SHAMPOO = (
    "Shampoo's own damping is not assessed: it sits inside a root of its factors L and R, in other units than K-FAC's, "
    "of which the damping tables speak"
)


def damping_wishes(
    state: OptimizerState | None, graph: Graph, settings: Settings, *, shampoo: bool = False
) -> DampingWishes:
    """The damping and weight decay that the optimizer uses for each layer.

    Damping is `settings.damping`, else the entry "damping" of the layer's parameter group; none for Shampoo. Weight
    decay counts where it is added to the gradient (not decoupled) and the same for all of the layer's parameters.
    """
    dampings, decays, lost = own_dampings(state), l2_decay(state), lost_dampings(state)
    current: dict[str, float] = {}
    decay: dict[str, float] = {}
    remarks: dict[str, str] = {}
    for spec in graph.chosen():
        found = _common(dampings, spec)
        if shampoo:
            remarks[spec.name] = SHAMPOO
        elif settings.damping is not None:
            current[spec.name] = settings.damping
        elif found:
            current[spec.name] = found
        elif away := _common(lost, spec):
            remarks[spec.name] = f"the optimizer's own damping of {away:g} is not assessed: it has to be {SQUARED}"
        value = _common(decays, spec)
        if value is None:
            uneven = "weight decay is not the same for all of the layer's parameters and is left out"
            remarks[spec.name] = "; ".join(filter(None, (remarks.get(spec.name, ""), uneven)))
        elif value > 0:
            decay[spec.name] = value
    return DampingWishes(current, decay, graph.parameters, remarks, "damping" in settings.measure)


def _common(values: Mapping[str, float], spec: LayerSpec) -> float | None:
    """The value of the layer's parameters, 0 where they have none; None where they differ in it."""
    names = list(spec.members) if spec.exact_only else [spec.weight] + ([spec.bias] if spec.bias is not None else [])
    found = {values.get(name, 0.0) for name in names}
    return found.pop() if len(found) == 1 else None
