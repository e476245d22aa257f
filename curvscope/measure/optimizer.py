"""What a checkpoint's optimizer says of damping: its own value and its L2 weight decay, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvscope.graph.functional import Graph
from curvscope.graph.sites import LayerSpec
from curvscope.load.problem import OptimizerState
from curvscope.measure.damping import DampingWishes
from curvscope.settings import Settings

# Their weight decay acts on the weights directly and is no part of the gradient that is preconditioned.
DECOUPLED = ("AdamW", "Lion", "Adafactor")
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
    groups = {} if state is None else _groups(state)
    current: dict[str, float] = {}
    decay: dict[str, float] = {}
    remarks: dict[str, str] = {}
    for spec in graph.chosen():
        found = _common(groups, spec, "damping")
        if shampoo:
            remarks[spec.name] = SHAMPOO
        elif settings.damping is not None:
            current[spec.name] = settings.damping
        elif found:
            current[spec.name] = found
        decoupled = state is not None and state.class_name in DECOUPLED
        if not decoupled and not _common(groups, spec, "decoupled_weight_decay"):
            value = _common(groups, spec, "weight_decay")
            if value is None:
                uneven = "weight decay is not the same for all of the layer's parameters and is left out"
                remarks[spec.name] = "; ".join(filter(None, (remarks.get(spec.name, ""), uneven)))
            elif value > 0:
                decay[spec.name] = value
    return DampingWishes(current, decay, graph.parameters, remarks, "damping" in settings.measure)


def _groups(state: OptimizerState) -> dict[str, Mapping[str, Any]]:
    """Parameter name to the options of its group."""
    groups = [group for group in state.state_dict["param_groups"] for _ in group["params"]]
    return {name: group for name, group in zip(state.param_names, groups, strict=False) if name}


def _common(groups: Mapping[str, Mapping[str, Any]], spec: LayerSpec, option: str) -> float | None:
    """A group's option as a number, 0 where there is none; None where the layer's parameters differ in it."""
    names = list(spec.members) if spec.exact_only else [spec.weight] + ([spec.bias] if spec.bias is not None else [])
    values = {groups[name].get(option, 0.0) if name in groups else 0.0 for name in names}
    if len(values) != 1:
        return None
    value = values.pop()
    return float(value) if isinstance(value, (bool, int, float)) else 0.0
