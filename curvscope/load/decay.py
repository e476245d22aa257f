"""What an optimizer's state says that a damped step needs: L2 decay by parameter, and a damping of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvscope.load.optimizer import entries_by_name
from curvscope.load.problem import OptimizerState

COUPLED = ("SGD", "Adam", "NAdam", "RMSprop", "Adagrad", "ASGD", "Adadelta", "Rprop", "KFAC", "KFACOptimizer")


def l2_decay(state: OptimizerState | None) -> dict[str, float]:
    """Parameter name -> weight decay that adds `decay * theta` to the gradient; none where it is zero or decoupled.

    Decoupled decay (AdamW's) shrinks the parameters beside the step and is no part of any loss. Of a class whose kind
    of decay is not known nothing is said.
    """
    if state is None or state.class_name.rpartition(".")[2] not in COUPLED:
        return {}
    rates = {
        name: _number(group, "weight_decay") or 0.0
        for name, (_, group, _) in entries_by_name(state).items()
        if not group.get("decoupled_weight_decay")
    }
    return {name: rate for name, rate in rates.items() if rate}


def own_dampings(state: OptimizerState | None) -> dict[str, float]:
    """Parameter name -> the damping of a second-order optimizer, where its group holds one."""
    entries = {} if state is None else entries_by_name(state)
    found = {name: _number(group, "damping") for name, (_, group, _) in entries.items()}
    return {name: value for name, value in found.items() if value is not None}


def own_damping(state: OptimizerState | None) -> float | None:
    """The damping of a second-order optimizer, where its groups hold one number of that name."""
    values = set(own_dampings(state).values())
    return values.pop() if len(values) == 1 else None


def _number(group: Mapping[str, Any], key: str) -> float | None:
    value = group.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
