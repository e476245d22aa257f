"""What an optimizer does to each parameter: learning rate, momentum, decay and moments, by name.

Of torch.optim SGD, Adam, AdamW, NAdam, RMSprop and Adagrad are understood, with all their flags that change numbers;
beside them K-FAC and Shampoo with frozen factors. Anything else is recognised and carries the reason why it is not
assessed: what is missing never passes for harmless.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvscope.load.optimizer import entries_by_name
from curvscope.load.optimizer_class import UNKNOWN
from curvscope.load.optimizer_ranges import out_of_range, spoiled
from curvscope.load.problem import OptimizerState, Schedule
from curvscope.load.shampoo_state import feeds_back, shampoo_factors
from curvscope.settings import LEAST_DAMPING, MOST_DAMPING, SQUARED

KINDS = ("sgd", "adam", "adamw", "nadam", "rmsprop", "adagrad", "kfac", "shampoo")
OTHER = "other"
CLASS_NAMES = {
    "SGD": "SGD",
    "Adam": "Adam",
    "AdamW": "AdamW",
    "NAdam": "NAdam",
    "RMSprop": "RMSprop",
    "Adagrad": "Adagrad",
    "KFAC": "K-FAC",
    "KFACOptimizer": "K-FAC",
    "Shampoo": "Shampoo",
    "DistributedShampoo": "Shampoo",
}
KIND_NAMES = {
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "nadam": "NAdam",
    "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
    "kfac": "K-FAC",
    "shampoo": "Shampoo",
}
FLAVOURS = ("expand", "reduce")
# What a state_dict or an override calls a number -> the field that holds it.
SCALARS = {
    "lr": "lr",
    "weight_decay": "weight_decay",
    "momentum": "momentum",
    "dampening": "dampening",
    "eps": "eps",
    "epsilon": "eps",
    "beta1": "beta1",
    "beta2": "beta2",
    "alpha": "beta2",
    "lr_decay": "lr_decay",
    "momentum_decay": "momentum_decay",
}
FLAGS = {
    "nesterov": "nesterov",
    "amsgrad": "amsgrad",
    "centered": "centered",
    "maximize": "maximize",
    "decoupled_weight_decay": "decoupled",
}
# torch's own defaults, where an override names the optimizer and leaves a number out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adam": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
    "adamw": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
    "nadam": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "momentum_decay": 4e-3},
    "rmsprop": {"beta2": 0.99, "eps": 1e-8},
    "adagrad": {"eps": 1e-10},
    "kfac": {},
    "shampoo": {},
}


@dataclass(frozen=True)
class ParameterSettings:
    """What the optimizer does to one parameter.

    `beta2` is the smoothing of the squared gradients (RMSprop's alpha); `decoupled` says that weight decay shrinks
    the parameter (AdamW) instead of adding to the gradient (L2). `step` counts the steps taken; `group` is the number
    of its parameter group; `moments` are the state's tensors by torch's names (exp_avg, exp_avg_sq, max_exp_avg_sq,
    square_avg, grad_avg, sum, momentum_buffer, mu_product; Shampoo: factor_0, ... or inverse_0, ...).
    """

    lr: float
    weight_decay: float = 0.0
    decoupled: bool = False
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    lr_decay: float = 0.0
    momentum_decay: float = 0.0
    amsgrad: bool = False
    centered: bool = False
    maximize: bool = False
    step: int = 0
    group: int = 0
    moments: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer as a plain record.

    Attributes:
        kind: one of `KINDS`, or "other".
        name: what a report calls it.
        parameters: the parameters it trains, by name.
        damping: of K-FAC and Shampoo, in the unit of their factors.
        flavour: K-FAC's, expand or reduce.
        problem: why it can't be assessed; empty where it can.
        notes: sentences on what was found beside it (clipping by value, unnamed parameters).
        clip: bound on the gradient's norm, where one is known.
        schedule: the rates that its scheduler sets from here on.
    """

    kind: str
    name: str
    parameters: Mapping[str, ParameterSettings]
    damping: float | None = None
    flavour: str = "expand"
    problem: str = ""
    notes: tuple[str, ...] = ()
    clip: float | None = None
    schedule: Schedule | None = None

    @property
    def main(self) -> ParameterSettings | None:
        """The settings that stand for all in words and thresholds: those of the largest learning rate."""
        return max(self.parameters.values(), key=lambda one: one.lr, default=None)

    @property
    def learning_rate(self) -> float:
        """The largest of the groups', NaN where none is known."""
        return math.nan if self.main is None else self.main.lr

    @property
    def label(self) -> str:
        """The optimizer in one line, e.g. "AdamW, lr 0.003, beta1 0.9, beta2 0.999, eps 1e-08, step 460"."""
        one = self.main
        if one is None:
            return self.name
        rates = sorted({each.lr for each in self.parameters.values()}, reverse=True)
        shown = (
            "not known"
            if any(map(math.isnan, rates))
            else f"{rates[0]:g}"
            if len(rates) == 1
            else f"{rates[-1]:g} to {rates[0]:g} ({len(rates)} values)"
        )
        parts = [f"lr {shown}"]
        if self.kind in ("adam", "adamw", "nadam"):
            parts += [f"beta1 {one.beta1:g}", f"beta2 {one.beta2:g}", f"eps {one.eps:g}"]
        if self.kind in ("rmsprop", "adagrad"):
            parts += [f"alpha {one.beta2:g}"] if self.kind == "rmsprop" else []
            parts += [f"eps {one.eps:g}"]
        parts += [f"momentum {one.momentum:g}" + (" (Nesterov)" if one.nesterov else "")] if one.momentum else []
        parts += [f"dampening {one.dampening:g}"] if one.dampening and one.momentum else []
        decay = max(each.weight_decay for each in self.parameters.values())
        if decay:
            parts.append(f"weight decay {decay:g}" + (" (decoupled)" if one.decoupled else ""))
        parts += [name for name in ("amsgrad", "centered") if getattr(one, name)]
        if self.damping is not None:
            parts.append(f"damping {self.damping:g}")
        if self.kind == "kfac":
            parts.append(self.flavour)
        if self.clip is not None:
            parts.append(f"gradient norm clipped at {self.clip:g}")
        parts += [f"step {one.step:,}"] if one.step else []
        return ", ".join([self.name, *parts])


def kind_of(class_name: str) -> str:
    """The kind of a class by its name, "other" where its thresholds are not known."""
    name = CLASS_NAMES.get(class_name.rpartition(".")[2], "")
    return next((kind for kind, known in KIND_NAMES.items() if known == name), OTHER)


def optimizer_settings(
    state: OptimizerState | None, shapes: Mapping[str, Sequence[int]], options: Mapping[str, Any] | None = None
) -> OptimizerSettings | None:
    """The settings for the trained parameters `shapes` (name to shape); None where nothing tells of an optimizer.

    `options` (`optimizer_options`) come before the state: they may name the kind, and any number in it. Moments are
    always the state's; each must have its parameter's shape, and all that the kind needs must be there.
    """
    options = dict(options or {})
    if state is None and not options:
        return None
    stored = kind_of(state.class_name) if state is not None else OTHER
    kind = str(options.get("kind", stored))
    name = KIND_NAMES.get(kind, state.class_name.rpartition(".")[2] if state is not None else "optimizer")
    given = {key: value for key, value in options.items() if key in {*SCALARS.values(), *FLAGS.values()}}
    if state is None and "kind" not in options:
        return OptimizerSettings(OTHER, name, {}, problem="no optimizer is known; name it with --optimizer")
    parameters: dict[str, ParameterSettings] = {}
    problems: list[str] = []
    entries = entries_by_name(state) if state is not None else {}
    # numbers of a class that is not known here count where the user names its kind
    same = state is not None and (stored == OTHER or kind in (stored, *(("adam", "adamw") if _is_adam(state) else ())))
    for parameter, shape in shapes.items():
        if state is not None and parameter not in entries:
            continue
        number, group, entry = entries.get(parameter, (0, {}, {}))
        numbers = _numbers(kind, group) if same else {}
        settings = {**DEFAULTS.get(kind, {}), **numbers, **given}
        if "lr" not in settings:
            problems.append("its learning rate is not known; give it with --lr")
            settings["lr"] = math.nan
        elif math.isnan(settings["lr"]):
            problems.append("its learning rate is not a number; give it with --lr")
        if odd := out_of_range(settings):
            problems.append(odd)
        moments, step, wrong = _moments(entry, shape)
        wrong = wrong or spoiled(moments)
        if wrong:
            problems.append(f"the state of {parameter} does not fit it: {wrong}")
        # another optimizer's moments are not this one's
        if not same:
            step, moments = 0, {}
        parameters[parameter] = ParameterSettings(**settings, step=step, group=number, moments=moments)
    result = OptimizerSettings(
        kind if kind in KINDS else OTHER,
        name,
        parameters,
        damping=_damping(state, options),
        flavour=str(options.get("flavour", "expand")),
        notes=_outside(state, shapes, entries, options),
        clip=options.get("clip_norm", None if state is None else state.clip) or None,
        # a rate of the user's own is none of the schedule
        schedule=state.schedule if state is not None and same and "lr" not in options else None,
    )
    problems += _problems(result, state)
    return dataclasses.replace(result, problem=problems[0] if problems else "")


def _is_adam(state: OptimizerState) -> bool:
    """Whether it is Adam or AdamW, which an older torch's state_dict does not tell apart."""
    options = {key for group in state.state_dict["param_groups"] for key in group}
    unknown = state.class_name == UNKNOWN and {"betas", "eps", "amsgrad"} <= options
    return unknown or kind_of(state.class_name) in ("adam", "adamw")


def _numbers(kind: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options as fields; numbers that a state keeps as tensors become floats."""
    found: dict[str, Any] = {}
    for key, name in SCALARS.items():
        if isinstance(group.get(key), (int, float, Tensor)):
            found[name] = float(group[key])
    for key, name in FLAGS.items():
        if key in group:
            found[name] = bool(group[key])
    betas = group.get("betas")
    if isinstance(betas, (tuple, list)) and len(betas) >= 2:
        found["beta1"], found["beta2"] = float(betas[0]), float(betas[1])
    if kind == "adamw":
        found["decoupled"] = True
    return found


def _moments(entry: Mapping[str, Any], shape: Sequence[int]) -> tuple[dict[str, Tensor], int, str]:
    """The state's tensors, the step, and what does not fit the parameter's shape."""
    moments: dict[str, Tensor] = {}
    step = 0
    for key, value in entry.items():
        if key in ("step", "num_steps") and isinstance(value, (int, float, Tensor)):
            step = int(value)
        elif key == "mu_product" and isinstance(value, (int, float, Tensor)):
            # in its own dtype, where torch rounds it, too
            moments[key] = torch.as_tensor(value)
        elif key in MOMENTS and isinstance(value, Tensor):
            if not value.is_floating_point():
                return moments, step, f"{key} is quantized ({str(value.dtype).removeprefix('torch.')})"
            if tuple(value.shape) != tuple(shape):
                return moments, step, f"{key} is {list(value.shape)}, the parameter {list(shape)}"
            moments[key] = value.detach()
    moments.update(shampoo_factors(entry, shape))
    return moments, step, ""


MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "sum", "momentum_buffer")


def _damping(state: OptimizerState | None, options: Mapping[str, Any]) -> float | None:
    """K-FAC's and Shampoo's damping: given, or the groups' own."""
    if "damping" in options:
        return float(options["damping"])
    for group in state.state_dict["param_groups"] if state is not None else ():
        for key in ("damping", "epsilon"):
            if isinstance(group.get(key), (int, float)):
                return float(group[key])
    return None


def _outside(
    state: OptimizerState | None, shapes: Mapping[str, Any], entries: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[str, ...]:
    """What else was found in the optimizer's state, a sentence each."""
    if state is None:
        return ()
    notes = list(state.notes)
    if state.schedule is not None and "lr" in options:
        notes.append(f"The learning rate is the one given; what its {state.schedule.name} does is left out.")
    missing = [name for name in shapes if name not in entries]
    if missing and len(missing) < len(shapes):
        notes.append(
            f"{len(missing)} trained parameters are not in the optimizer ({missing[0]}, ...): they stay where they are."
            if len(missing) > 1
            else f"The parameter {missing[0]} is not in the optimizer: it stays where it is."
        )
    return tuple(notes)


NEEDED = {
    "adam": ("exp_avg_sq",),
    "adamw": ("exp_avg_sq",),
    "nadam": ("exp_avg_sq", "mu_product"),
    "rmsprop": ("square_avg",),
    "adagrad": ("sum",),
}
BIAS_CORRECTED = ("adam", "adamw", "nadam")


def _problems(settings: OptimizerSettings, state: OptimizerState | None) -> list[str]:
    """Why the optimizer can't be assessed, the plainest reason first."""
    found: list[str] = []
    if settings.kind == OTHER:
        return [
            "the state_dict does not name its class (an older torch's Adam or AdamW with weight decay, or another)"
            if state is not None and state.class_name == UNKNOWN
            else f"no stability threshold is known for {settings.name}"
        ]
    if not settings.parameters:
        return ["none of the trained parameters is in the optimizer's state"]
    needed = NEEDED.get(settings.kind, ())
    for name, one in settings.parameters.items():
        wanted = [*needed, *(["max_exp_avg_sq"] if one.amsgrad else []), *(["grad_avg"] if one.centered else [])]
        missing = next((key for key in wanted if key not in one.moments), None)
        if missing is not None:
            found.append(
                f"its state has no {missing} of {name}: the optimizer took no step yet, or was saved without its state"
            )
        elif settings.kind in BIAS_CORRECTED and one.step < 1:
            found.append(f"its state has no step count for {name}, which bias correction needs")
        elif settings.kind == "shampoo" and not any(key.startswith(("factor_", "inverse_")) for key in one.moments):
            found.append(f"its state has no factors of {name} in a form known here")
        if one.maximize:
            found.append("it maximizes the loss; the thresholds are those of minimization")
        if found:
            break
    momentum = any(one.momentum for one in settings.parameters.values())
    if settings.kind == "shampoo" and momentum and state is not None and feeds_back(state.state_dict["state"].values()):
        found.append(
            "its momentum goes through the preconditioner again, as in torch_optimizer and pytorch_optimizer, for "
            "which no threshold is known"
        )
    if settings.damping and not LEAST_DAMPING <= settings.damping <= MOST_DAMPING:
        found.append(f"its damping is {settings.damping:g}, which has to be {SQUARED}")
    if settings.kind == "kfac" and settings.damping is None:
        found.append("K-FAC's damping is not known; give it with --damping")
    factored = settings.kind == "shampoo" and any(
        key.startswith("factor_") for one in settings.parameters.values() for key in one.moments
    )
    if factored and settings.damping is None:
        found.append("Shampoo's damping is not known; give it with --damping")
    return found
