"""What the optimizer divides the gradient by, and the whole step it would take next, from its settings alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from curvscope.load.optimizer_settings import OptimizerSettings, ParameterSettings
from curvscope.measure.thresholds import dynamics

ELEMENTWISE = ("sgd", "adam", "adamw", "nadam", "rmsprop", "adagrad")
# Those whose P takes the squared gradient in before it is used.
TAKES_IN = ELEMENTWISE[1:]


def denominator(kind: str, one: ParameterSettings) -> Tensor | None:
    """P's diagonal for one parameter, float64, in the parameter's shape; None for P = I.

    Adam, AdamW `(1 - beta1^t)(sqrt(v / (1 - beta2^t)) + eps)` (v the running maximum with amsgrad); NAdam the same
    without the first factor; RMSprop `sqrt(v) + eps`, v - mean^2 where centered; Adagrad `sqrt(sum) + eps`. t is the
    stored step.
    """
    if kind == "sgd":
        return None
    if kind in ("adam", "adamw", "nadam"):
        v = one.moments["max_exp_avg_sq" if one.amsgrad else "exp_avg_sq"].double()
        root = (v / (1 - one.beta2**one.step)).sqrt() + one.eps
        return root if kind == "nadam" else (1 - one.beta1**one.step) * root
    if kind == "rmsprop":
        v = one.moments["square_avg"].double()
        if one.centered:
            v = v - one.moments["grad_avg"].double().square()
        return v.sqrt() + one.eps
    if kind == "adagrad":
        return one.moments["sum"].double().sqrt() + one.eps
    raise ValueError(f"{kind} has no elementwise preconditioner")


def next_update(
    settings: OptimizerSettings, parameters: Mapping[str, Tensor], gradient: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The step that torch's optimizer would take with this gradient, float64, by name; elementwise kinds only.

    Moments advance by the gradient first, as they do in torch, so that this is the step itself and not its
    linearisation.

    Raises:
        ValueError: K-FAC, Shampoo or an unknown kind.
    """
    found: dict[str, Tensor] = {}
    for name, one in settings.parameters.items():
        if name not in gradient:
            continue
        value = parameters[name].double()
        g = _entering(one, value, gradient[name])
        moved = advanced(settings.kind, one, g)
        step = dynamics(settings.kind, moved)
        P = denominator(settings.kind, moved)
        direction = g if P is None else g / P
        kept = _memory(settings.kind, one, g, direction, step.retained, step.entering)
        if P is not None and settings.kind in ("adam", "adamw", "nadam"):
            kept = kept / P
        found[name] = -step.lr * (step.averaged * kept + step.direct * direction) - step.decay * value
    return found


def advanced_settings(
    settings: OptimizerSettings, parameters: Mapping[str, Tensor], gradient: Mapping[str, Tensor]
) -> OptimizerSettings:
    """The settings with which the next step divides: moments of squares that took this gradient in."""
    moved = {
        name: advanced(settings.kind, one, _entering(one, parameters[name].double(), gradient[name]))
        if name in gradient
        else one
        for name, one in settings.parameters.items()
    }
    return dataclasses.replace(settings, parameters=moved)


def _entering(one: ParameterSettings, value: Tensor, gradient: Tensor) -> Tensor:
    """The gradient as the optimizer sees it: its sign, and L2 decay."""
    g = -gradient.double() if one.maximize else gradient.double()
    return g + one.weight_decay * value if one.weight_decay and not one.decoupled else g


def advanced(kind: str, one: ParameterSettings, g: Tensor) -> ParameterSettings:
    """The settings after the moments of squares took the gradient in and the step was counted."""
    moments = {name: tensor if name == "mu_product" else tensor.double() for name, tensor in one.moments.items()}
    if kind in ("adam", "adamw", "nadam"):
        moments["exp_avg_sq"] = one.beta2 * moments["exp_avg_sq"] + (1 - one.beta2) * g.square()
        if one.amsgrad:
            moments["max_exp_avg_sq"] = torch.maximum(moments["max_exp_avg_sq"], moments["exp_avg_sq"])
    elif kind == "rmsprop":
        moments["square_avg"] = one.beta2 * moments["square_avg"] + (1 - one.beta2) * g.square()
        if one.centered:
            moments["grad_avg"] = one.beta2 * moments["grad_avg"] + (1 - one.beta2) * g
    elif kind == "adagrad":
        moments["sum"] = moments["sum"] + g.square()
    if kind == "nadam":
        now = one.beta1 * (1 - 0.5 * 0.96 ** ((one.step + 1) * one.momentum_decay))
        moments["mu_product"] = moments["mu_product"] * now
    return dataclasses.replace(one, step=one.step + 1, moments=moments)


def _memory(
    kind: str, one: ParameterSettings, g: Tensor, direction: Tensor, retained: float, entering: float
) -> Tensor:
    """The momentum after the gradient: of gradients for Adam and SGD, of preconditioned ones for RMSprop."""
    if retained == 0:
        return entering * (g if kind in ("adam", "adamw", "nadam") else direction)
    if kind in ("adam", "adamw", "nadam"):
        return retained * one.moments["exp_avg"].double() + entering * g
    before = one.moments.get("momentum_buffer")
    if before is None:  # torch's first step takes the gradient whole
        return direction
    return retained * before.double() + entering * direction
