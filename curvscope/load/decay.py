"""What an optimizer's state says that a damped step needs: L2 decay by parameter, and a damping of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curvscope.load.optimizer import entries_by_name
from curvscope.load.optimizer_settings import kind_of
from curvscope.load.problem import OptimizerState, Problem
from curvscope.settings import LEAST_DAMPING, MOST_DAMPING

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
    """Parameter name -> the damping of a second-order optimizer, where its group holds one that can be computed with.

    One that is not 0 and whose square float64 does not hold is left out (see `lost_dampings`).
    """
    return {name: value for name, value in _dampings(state).items() if _usable(value)}


def lost_dampings(state: OptimizerState | None) -> dict[str, float]:
    """Parameter name -> the damping that its group holds and that can't be computed with."""
    return {name: value for name, value in _dampings(state).items() if not _usable(value)}


def _usable(damping: float) -> bool:
    return damping == 0 or LEAST_DAMPING <= damping <= MOST_DAMPING


def _dampings(state: OptimizerState | None) -> dict[str, float]:
    entries = {} if state is None else entries_by_name(state)
    found = {name: _number(group, "damping") for name, (_, group, _) in entries.items()}
    return {name: value for name, value in found.items() if value is not None}


def own_damping(state: OptimizerState | None) -> float | None:
    """The damping of a second-order optimizer, where its groups hold one number of that name."""
    values = set(own_dampings(state).values())
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
