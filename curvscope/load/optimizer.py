"""The optimizer's state: a live optimizer's, or one found in a checkpoint and matched to the parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvscope.errors import UsageError
from curvscope.load.optimizer_class import class_name_of, class_name_of_live
from curvscope.load.problem import OptimizerState
from curvscope.load.schedule import schedule

OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim", "optim_state_dict", "optimizer_state", "opt")
SEVERAL = "optimizer_states"
STEP_KEYS = ("global_step", "step", "iteration", "iter")
OUTSIDE = ""
"""Name of an optimizer's parameter that is not a parameter of the model."""
NO_DECAY_WORDS = ("bias", "norm", "ln_")


def as_optimizer_state(
    optimizer: Any, model: nn.Module | None, *, scheduler: Any = None, clip_norm: float | None = None
) -> OptimizerState | None:
    """A live torch.optim optimizer as class name, parameter names in its own order, and state_dict.

    Names are found by identity among `model.named_parameters()`; a parameter of something else is named "".

    Raises:
        UsageError: it is no torch optimizer, or none of its parameters belongs to the model; a scheduler that has no
            state_dict or no optimizer here, or a bound on the gradient's norm that is none.
    """
    if scheduler is not None and not (optimizer is not None and callable(getattr(scheduler, "state_dict", None))):
        raise UsageError(
            "A scheduler is one of torch.optim.lr_scheduler and comes with its optimizer; got "
            f"{type(scheduler).__name__} and {'no' if optimizer is None else 'an'} optimizer.",
            where="scheduler",
            remedy="Pass scheduler= beside optimizer=, or leave it out.",
        )
    if clip_norm is not None and not (isinstance(clip_norm, (int, float)) and 0 < clip_norm < math.inf):
        raise UsageError(
            f"A bound on the gradient's norm is a positive number; got {clip_norm!r}.",
            where="clip_norm",
            remedy="Pass the max_norm of torch.nn.utils.clip_grad_norm_, or leave it out.",
        )
    if optimizer is None or isinstance(optimizer, OptimizerState):
        return optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"An optimizer is a torch.optim.Optimizer; got {type(optimizer).__name__}.",
            where="optimizer",
            remedy="Pass the optimizer that trains this model, or leave it out.",
        )
    names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    order = [names.get(id(p), OUTSIDE) for group in optimizer.param_groups for p in group["params"]]
    if not any(order):
        raise UsageError(
            "None of the optimizer's parameters belongs to this model.",
            where=f"optimizer {type(optimizer).__name__}",
            remedy="Pass the optimizer that was made from model.parameters().",
        )
    state = optimizer.state_dict()
    ahead = None
    if scheduler is not None:
        ahead = schedule(scheduler.state_dict(), state["param_groups"], type(scheduler).__name__)
    return OptimizerState(class_name_of_live(optimizer), tuple(order), state, clip=clip_norm, schedule=ahead)


def entries_by_name(state: OptimizerState) -> dict[str, tuple[int, Mapping[str, Any], Mapping[str, Any]]]:
    """Parameter name to its group's number, the group's options, and the parameter's own state."""
    found: dict[str, tuple[int, Mapping[str, Any], Mapping[str, Any]]] = {}
    position = 0
    for number, group in enumerate(state.state_dict["param_groups"]):
        for index in group["params"]:
            name = state.param_names[position] if position < len(state.param_names) else OUTSIDE
            position += 1
            if name != OUTSIDE:
                entry = state.state_dict["state"].get(index, {})
                found[name] = (number, group, entry if isinstance(entry, Mapping) else {})
    return found


def find_optimizer_state(content: Mapping[Any, Any]) -> Mapping[str, Any] | None:
    """The optimizer's state_dict in a training checkpoint (Lightning keeps a list: its first)."""
    for key in OPTIMIZER_KEYS:
        if is_optimizer_state(content.get(key)):
            return content[key]
    several = content.get(SEVERAL)
    if isinstance(several, (list, tuple)) and several and is_optimizer_state(several[0]):
        return several[0]
    return None


def is_optimizer_state(value: Any) -> bool:
    """Whether it has the two keys of a torch.optim state_dict."""
    return isinstance(value, Mapping) and "state" in value and isinstance(value.get("param_groups"), (list, tuple))


MEANS = frozenset({"exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var"})
"""Adafactor's second moments: means over one axis of a parameter."""


def find_step(content: Mapping[Any, Any]) -> int | None:
    """The training step, where a checkpoint says so under a usual key."""
    for key in STEP_KEYS:
        value = content.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, Tensor) and value.numel() == 1:
            return int(value)
    return None


def match_optimizer(
    state: Mapping[str, Any] | None, parameters: Sequence[tuple[str, Tensor]]
) -> tuple[OptimizerState | None, tuple[str, ...]]:
    """The state with parameter names, and notes on how they were found.

    A state_dict numbers its parameters; their names are its own `param_names` where it has them, else the
    model's order: trainable parameters, or all of them, or first those with weight decay and then those
    without. An order counts only if every per-parameter tensor of the state has its parameter's shape; where
    none does the state is left out, and a note says so.
    """
    if state is None:
        return None, ()
    try:
        groups = [list(group["params"]) for group in state["param_groups"]]
    except (KeyError, TypeError):
        return None, ("The optimizer's state has an unknown form and was left out.",)
    name, name_note = class_name_of(state)
    for order in _orders(state, groups, parameters):
        if _fits(state, [index for group in groups for index in group], order, dict(parameters)):
            return OptimizerState(name, tuple(order), state), name_note
    return None, (
        f"The optimizer's state was left out: its {sum(map(len, groups))} parameters could not be matched "
        "to the "
        f"model's {len(parameters)} by order and shape.",
    )


def _orders(
    state: Mapping[str, Any], groups: list[list[Any]], parameters: Sequence[tuple[str, Tensor]]
) -> list[list[str]]:
    """Candidate name orders, the surest first."""
    named = [list(group["param_names"]) for group in state["param_groups"] if "param_names" in group]
    if len(named) == len(groups):
        return [[name for group in named for name in group]]
    orders = []
    trainable = [name for name, parameter in parameters if parameter.requires_grad]
    for names in (trainable, [name for name, _ in parameters]):
        orders.append(names)
        if len(groups) > 1:
            shapes = dict(parameters)
            for without in (_by_word, _by_word_or_rank):
                decay = [n for n in names if not without(n, shapes[n])]
                orders.append(decay + [n for n in names if without(n, shapes[n])])
    return orders


def _by_word(name: str, _parameter: Tensor) -> bool:
    return any(word in name.lower() for word in NO_DECAY_WORDS)


def _by_word_or_rank(name: str, parameter: Tensor) -> bool:
    return parameter.ndim < 2 or _by_word(name, parameter)


def _fits(state: Mapping[str, Any], indices: list[Any], order: list[str], parameters: Mapping[str, Tensor]) -> bool:
    if len(order) != len(indices):
        return False
    for index, name in zip(indices, order, strict=True):
        parameter = parameters.get(name)
        if parameter is None:
            return False
        entry = state["state"].get(index, {})
        for key, value in entry.items() if isinstance(entry, Mapping) else ():
            # "step" is a scalar; a moment has the parameter's own shape, a Shampoo factor that of an axis squared
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                if value.ndim == 2 and value.shape[0] == value.shape[1] and value.shape[0] in parameter.shape:
                    continue
                if key in MEANS and parameter.numel() % value.numel() == 0:
                    continue
                return False
    return True
