"""Which optimizer a state_dict is of, by the options of its groups and the names of its tensors.

A state_dict does not name its class. One of torch.optim is named only where options and state are that class's own and
nothing else: what looks like Adam may be AdaBelief, an 8-bit AdamW or a variant with a switch of its own, whose
steps are others. Everything else is named where it can be, and has no threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

UNKNOWN = "unknown"
"""Class name where the state_dict does not tell."""
NOT_TOLD = "The optimizer's class could not be told from its state."

KNOWN_OPTIONS = frozenset(
    (
        *("params", "param_names", "name", "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"),
        *("foreach", "differentiable", "fused", "capturable", "initial_lr", "max_lr", "min_lr", "base_momentum"),
        *("max_momentum", "swa_lr", "lr_scale", "damping"),
    )
)
"""Options of torch's SGD, and those that schedulers and training scripts add to groups."""
TORCHS_OWN: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "NAdam": (
        frozenset({"betas", "eps", "momentum_decay", "decoupled_weight_decay"}),
        frozenset({"step", "exp_avg", "exp_avg_sq", "mu_product"}),
    ),
    "Adam": (
        frozenset({"betas", "eps", "amsgrad", "decoupled_weight_decay"}),
        frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    ),
    "SGD": (frozenset(), frozenset({"momentum_buffer"})),
    "RMSprop": (
        frozenset({"alpha", "eps", "centered"}),
        frozenset({"step", "square_avg", "grad_avg", "momentum_buffer"}),
    ),
    "Adagrad": (frozenset({"lr_decay", "eps", "initial_accumulator_value"}), frozenset({"step", "sum"})),
}
"""Of the classes that have a threshold: the options beside `KNOWN_OPTIONS`, and the tensors of their state."""
MARKS: tuple[tuple[str, frozenset[str]], ...] = (
    ("NAdam", frozenset({"betas", "eps", "momentum_decay"})),
    ("Adam", frozenset({"betas", "eps", "amsgrad"})),
    ("SGD", frozenset({"momentum", "dampening", "nesterov"})),
    ("RMSprop", frozenset({"alpha", "centered"})),
    ("Adagrad", frozenset({"lr_decay", "initial_accumulator_value"})),
)
"""The options by which these are told, the more special first."""
OTHERS: tuple[tuple[str, frozenset[str]], ...] = (
    ("Muon", frozenset({"ns_steps", "momentum"})),
    ("Adafactor", frozenset({"beta2_decay", "d"})),
    ("Adafactor", frozenset({"scale_parameter", "relative_step"})),
    ("ScheduleFree", frozenset({"weight_lr_power", "r"})),
    ("AdEMAMix", frozenset({"betas", "alpha", "eps", "beta3_warmup"})),
    ("AdEMAMix", frozenset({"betas", "alpha", "eps", "t_alpha_beta3"})),
    ("Prodigy", frozenset({"d0", "d_coef"})),
    ("Shampoo", frozenset({"epsilon", "update_freq"})),
    ("ASGD", frozenset({"lambd", "t0"})),
    ("Rprop", frozenset({"etas", "step_sizes"})),
    ("LBFGS", frozenset({"line_search_fn"})),
    ("LARS", frozenset({"trust_coefficient"})),
    ("Sophia", frozenset({"betas", "rho"})),
    ("FusedAdam", frozenset({"betas", "eps", "bias_correction"})),
)
"""Optimizers that the options tell apart, and that are recognised to be named, most of them without a threshold."""
OTHER_STATES: tuple[tuple[str, frozenset[str]], ...] = (
    ("Adamax", frozenset({"exp_inf"})),
    ("Adadelta", frozenset({"acc_delta"})),
    ("AdaBelief", frozenset({"exp_avg_var"})),
    ("bitsandbytes", frozenset({"state1"})),
    ("Adafactor", frozenset({"exp_avg_sq_row"})),
)
"""Optimizers that the names of their tensors tell apart."""


def class_name_of(state: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The optimizer's class as far as options and state tell, and a note where they do not.

    Adam and AdamW have the same options in older versions of torch: without weight decay they are the same optimizer,
    with it they can't be told apart.
    """
    groups = state["param_groups"]
    options = {key for group in groups for key in group}
    if "lr" not in options:
        return UNKNOWN, (NOT_TOLD,)
    held = {key for entry in state["state"].values() if isinstance(entry, Mapping) for key in entry}
    for name, needed in OTHER_STATES:
        if needed <= held:
            return name, ()
    for name, needed in OTHERS:
        if needed <= options:
            return name, ()
    looks = next((name for name, needed in MARKS if needed <= options), "")
    if not looks:
        return _unmarked(options)
    own, tensors = TORCHS_OWN[looks]
    strange = sorted(key for key in options - KNOWN_OPTIONS - own if any(_counts(group.get(key)) for group in groups))
    if strange:
        return UNKNOWN, (f"The optimizer looks like {looks} but has options of its own ({', '.join(strange[:4])}).",)
    if held - tensors:
        shown = ", ".join(sorted(map(str, held - tensors))[:4])
        return UNKNOWN, (f"The optimizer looks like {looks} but its state holds {shown}.",)
    if looks != "Adam":
        return looks, ()
    if "decoupled_weight_decay" in options:
        return ("AdamW" if any(group.get("decoupled_weight_decay") for group in groups) else "Adam"), ()
    if not any(group.get("weight_decay") for group in groups):
        return "Adam", ()
    return UNKNOWN, ("The optimizer is Adam or AdamW; its state_dict does not say which.",)


def class_name_of_live(optimizer: torch.optim.Optimizer) -> str:
    """A live optimizer's class; with its package where it is another's class of the name of one of torch's."""
    kind = type(optimizer)
    torchs = getattr(torch.optim, kind.__name__, None)
    if torchs is None or kind is torchs:
        return kind.__name__
    return f"{kind.__name__} of {kind.__module__.partition('.')[0]}"


def _unmarked(options: set[str]) -> tuple[str, tuple[str, ...]]:
    """Two that are told by what they lack."""
    rest = options - KNOWN_OPTIONS
    if rest == {"betas"}:
        return "Lion", ()
    if rest == {"betas", "eps", "decoupled_weight_decay"}:
        return "RAdam", ()
    return UNKNOWN, (NOT_TOLD,)


def _counts(value: Any) -> bool:
    """Whether an option may change numbers: no name or tag of a training script's."""
    return isinstance(value, (bool, int, float, Tensor, list, tuple))
