"""What an optimizer's state says that a damped step needs: L2 decay by parameter, and a damping of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvscope.load.optimizer import OUTSIDE
from curvscope.load.optimizer_settings import kind_of
from curvscope.load.problem import OptimizerState, Problem

DECOUPLED = ("AdamW", "NAdamW", "Lion")
COUPLED = ("SGD", "Adam", "NAdam", "RMSprop", "Adagrad", "ASGD", "Adadelta", "Rprop", "KFAC", "KFACOptimizer")


def l2_decay(state: OptimizerState | None) -> dict[str, float]:
    """Parameter name -> weight decay that adds `decay * theta` to the gradient; none where it is zero or decoupled.

    Decoupled decay (AdamW's) shrinks the parameters beside the step and is no part of any loss. Of a class whose kind
    of decay is not known nothing is said.
    """
    if state is None or state.class_name.rpartition(".")[2] not in (*COUPLED, *DECOUPLED):
        return {}
    found: dict[str, float] = {}
    names = iter(state.param_names)
    for group in state.state_dict["param_groups"]:
        rate = _number(group, "weight_decay") or 0.0
        decoupled = bool(group.get("decoupled_weight_decay")) or state.class_name in DECOUPLED
        for _, name in zip(group["params"], names, strict=False):
            if rate and not decoupled and name != OUTSIDE:
                found[name] = rate
    return found


def own_damping(state: OptimizerState | None) -> float | None:
    """The damping of a second-order optimizer, where its groups hold one number of that name."""
    groups = state.state_dict["param_groups"] if state is not None else ()
    values = {value for group in groups if (value := _number(group, "damping")) is not None}
    return values.pop() if len(values) == 1 else None


def is_shampoo(problem: Problem) -> bool:
    """Whether the optimizer, as named or as stored, is Shampoo."""
    stored = "" if problem.optimizer is None else kind_of(problem.optimizer.class_name)
    return problem.optimizer_options.get("kind", stored) == "shampoo"


def kfac_damping(problem: Problem, given: float | None = None) -> float | None:
    """The damping in K-FAC's sense, added to a layer's curvature: the one given, or the optimizer's own.

    None for Shampoo, whose damping sits inside a root of its factors and is in their units.
    """
    if is_shampoo(problem):
        return None
    return own_damping(problem.optimizer) if given is None else given


def _number(group: Mapping[str, Any], key: str) -> float | None:
    value = group.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
