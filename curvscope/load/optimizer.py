"""The optimizer's state: a live optimizer's, or one found in a checkpoint and matched to the parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvscope.errors import UsageError
from curvscope.load.problem import OptimizerState

OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optim", "optim_state_dict", "optimizer_state", "opt")
STEP_KEYS = ("global_step", "step", "iteration", "iter")
UNKNOWN = "unknown"
"""Class name where the state_dict does not tell."""
OUTSIDE = ""
"""Name of an optimizer's parameter that is not a parameter of the model."""
NO_DECAY_WORDS = ("bias", "norm", "ln_")
SCHEDULER_KEYS = ("lr_scheduler", "scheduler", "lr_schedulers", "scheduler_state_dict", "lr_scheduler_state_dict")
CLIP_KEYS = ("gradient_clip_val", "max_grad_norm", "grad_clip", "clip_grad_norm", "clip_grad", "grad_clip_norm")
SETTINGS_KEYS = ("hyper_parameters", "hparams", "args", "config", "cfg")


def as_optimizer_state(optimizer: Any, model: nn.Module | None) -> OptimizerState | None:
    """A live torch.optim optimizer as class name, parameter names in its own order, and state_dict.

    Names are found by identity among `model.named_parameters()`; a parameter of something else is named "".

    Raises:
        UsageError: it is no torch optimizer, or none of its parameters belongs to the model.
    """
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
    return OptimizerState(type(optimizer).__name__, tuple(order), optimizer.state_dict())


def find_optimizer_state(content: Mapping[Any, Any]) -> Mapping[str, Any] | None:
    """The optimizer's state_dict in a training checkpoint (Lightning keeps a list: its first)."""
    for key in OPTIMIZER_KEYS:
        if is_optimizer_state(content.get(key)):
            return content[key]
    several = content.get("optimizer_states")
    if isinstance(several, (list, tuple)) and several and is_optimizer_state(several[0]):
        return several[0]
    return None


def is_optimizer_state(value: Any) -> bool:
    """Whether it has the two keys of a torch.optim state_dict."""
    return isinstance(value, Mapping) and "state" in value and isinstance(value.get("param_groups"), (list, tuple))


def find_clip(content: Mapping[Any, Any]) -> float | None:
    """The bound on the gradient's norm that a checkpoint stores, at its top or among its hyperparameters."""
    places = [content, *(content[key] for key in SETTINGS_KEYS if key in content)]
    for place in places:
        values = place if isinstance(place, Mapping) else getattr(place, "__dict__", {})
        for key in CLIP_KEYS:
            value = values.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                return float(value)
    return None


def scheduler_notes(content: Mapping[Any, Any], state: Mapping[str, Any]) -> tuple[str, ...]:
    """What the scheduler's state says: it is there, and whether its last learning rates are the optimizer's.

    A scheduler writes the rate of the next step into the optimizer's groups, so that theirs are the ones to use.
    """
    found = next((content[key] for key in SCHEDULER_KEYS if content.get(key)), None)
    found = found[0] if isinstance(found, (list, tuple)) and found else found
    last = found.get("_last_lr") if isinstance(found, Mapping) else None
    if not isinstance(last, (list, tuple)) or not all(isinstance(rate, (int, float, Tensor)) for rate in last):
        return ()
    rates, groups = [float(rate) for rate in last], [group.get("lr") for group in state["param_groups"]]
    if len(rates) == len(groups) and all(
        rate is not None and math.isclose(own, float(rate), rel_tol=1e-6, abs_tol=1e-300)
        for own, rate in zip(rates, groups, strict=True)
    ):
        return ("A scheduler sets the learning rate; what is judged is the rate of the next step.",)
    shown = ", ".join(f"{rate:g}" for rate in rates[:3])
    return (f"The scheduler's last learning rate ({shown}) is not the optimizer's, which is the one judged.",)


def with_surroundings(state: OptimizerState | None, content: Mapping[Any, Any]) -> OptimizerState | None:
    """The optimizer's state with the scheduler's and the clipping's traces in the same checkpoint."""
    if state is None:
        return None
    notes = scheduler_notes(content, state.state_dict)
    return dataclasses.replace(state, clip=find_clip(content), notes=notes)


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


def class_name_of(state: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The optimizer's class as far as its options tell, and a note where they do not.

    A state_dict does not name its class. Adam and AdamW have the same options in older versions of
    torch: without weight decay they are the same optimizer, with it they can't be told apart.
    """
    groups = state["param_groups"]
    options = {key for group in groups for key in group}
    if "lr" not in options:
        return UNKNOWN, ("The optimizer's class could not be told from its state.",)
    if {"betas", "eps", "amsgrad"} <= options:
        if "decoupled_weight_decay" in options:
            decoupled = any(group.get("decoupled_weight_decay") for group in groups)
            return ("AdamW" if decoupled else "Adam"), ()
        if not any(group.get("weight_decay") for group in groups):
            return "Adam", ()
        return UNKNOWN, ("The optimizer is Adam or AdamW; its state_dict does not say which.",)
    for name, needed in (
        ("NAdam", {"betas", "eps", "momentum_decay"}),
        ("SGD", {"momentum", "dampening", "nesterov"}),
        ("RMSprop", {"alpha", "centered"}),
        ("Adagrad", {"lr_decay", "initial_accumulator_value"}),
    ):
        if needed <= options:
            return name, ()
    return UNKNOWN, ("The optimizer's class could not be told from its state.",)


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
        for value in entry.values() if isinstance(entry, Mapping) else ():
            # "step" is a scalar; a moment has the parameter's own shape, a Shampoo factor that of an axis squared
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                if value.ndim == 2 and value.shape[0] == value.shape[1] and value.shape[0] in parameter.shape:
                    continue
                return False
    return True
