"""Signs that the optimizer's next step shows: its size against the weights, its moments against the gradient."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvscope.load.optimizer_settings import OptimizerSettings, ParameterSettings
from curvscope.measure.network import Vector
from curvscope.measure.preconditioner import Preconditioner
from curvscope.measure.signs import missing, sign_row
from curvscope.measure.surroundings import clipped
from curvscope.measure.update import ELEMENTWISE, advanced, next_update
from curvscope.records import StabilityRow

MOMENTS = {"adam": "exp_avg_sq", "adamw": "exp_avg_sq", "nadam": "exp_avg_sq", "rmsprop": "square_avg"}
QUANTITIES = ("update_ratio", "update_rms", "eps_share", "learning_rate_ratio")


def update_signs(
    settings: OptimizerSettings,
    parameters: Vector,
    gradients: Sequence[Vector],
    members: Mapping[str, Sequence[str]],
    P: Preconditioner | None,
) -> list[StabilityRow]:
    """Rows of the network and of every layer; `gradients` is that of the batch, then those of its halves.

    `update_ratio` is ||next step|| / ||weights||; `update_rms` = sqrt(mean(g^2 / max(v, eps^2))), v with g taken in and
    the bias corrected, as in arXiv:2304.13013; `eps_share` the share of entries whose gradients were ever nonzero in
    which eps is larger than sqrt(v); `learning_rate_ratio` a layer's learning rate over the median of all layers';
    `beta1_over_root_beta2` the largest of the groups'; `early_moments` = 1 / (1 - beta1^t), the factor by which P still
    grows as the momentum's bias correction fades. Where the gradient's norm is clipped, g is the clipped one.
    """
    if settings.problem:
        return [missing(name, settings.problem) for name in QUANTITIES]
    gradients = [clipped(gradient, settings.clip) for gradient in gradients]
    rows = _ratios(settings, parameters, gradients[0], members, P)
    if settings.kind in MOMENTS:
        rows += _moments(settings, gradients, members)
        if settings.kind != "rmsprop":
            most = max(
                (one.beta1 / one.beta2**0.5 for one in settings.parameters.values() if one.beta2 > 0), default=0.0
            )
            rows.append(sign_row("beta1_over_root_beta2", most))
        if settings.kind in ("adam", "adamw"):
            main = max(settings.parameters.values(), key=lambda one: one.lr)
            rows.append(sign_row("early_moments", 1 / (1 - main.beta1**main.step), reason=f"step {main.step}"))
    return rows + _rates(settings, members)


def step(
    settings: OptimizerSettings, parameters: Vector, gradient: Vector, P: Preconditioner | None
) -> dict[str, Tensor] | str:
    """The next update by name, or why it is not known; of K-FAC and Shampoo without momentum and decay."""
    if settings.kind in ELEMENTWISE:
        return next_update(settings, parameters, gradient)
    if P is None:
        return "there is no preconditioner"
    moved = P.inverse_root(P.inverse_root({name: gradient[name] for name in P.names if name in gradient}))
    return {name: -P.step.lr * tensor for name, tensor in moved.items()}


def _ratios(
    settings: OptimizerSettings,
    parameters: Vector,
    gradient: Vector,
    members: Mapping[str, Sequence[str]],
    P: Preconditioner | None,
) -> list[StabilityRow]:
    update = step(settings, parameters, gradient, P)
    if isinstance(update, str):
        return [missing("update_ratio", update)]
    reason = "" if settings.kind in ELEMENTWISE else "without momentum and weight decay"
    rows = []
    for layer, names in {"": list(parameters), **members}.items():
        moving = [name for name in names if name in update]
        weights = sum(float(parameters[name].double().square().sum()) for name in names if name in parameters) ** 0.5
        if not moving:
            rows.append(missing("update_ratio", "the optimizer does not move it", layer=layer))
        elif weights == 0:
            rows.append(missing("update_ratio", "its weights are all zero", layer=layer))
        else:
            moved = sum(float(update[name].square().sum()) for name in moving) ** 0.5
            rows.append(sign_row("update_ratio", moved / weights, layer=layer, reason=reason))
    return rows


def _moments(
    settings: OptimizerSettings, gradients: Sequence[Vector], members: Mapping[str, Sequence[str]]
) -> list[StabilityRow]:
    of_batch: dict[str, list[tuple[float, float, int]]] = {}
    for gradient in gradients:
        for name, one in settings.parameters.items():
            if name in gradient:
                of_batch.setdefault(name, []).append(_parameter(settings.kind, one, gradient[name].double()))
    rows = []
    for layer, names in {"": list(of_batch), **members}.items():
        known = [of_batch[name] for name in names if name in of_batch]
        if not known:
            rows.append(missing("update_rms", "the optimizer does not move it", layer=layer))
            continue
        size = sum(one[0][2] for one in known)
        if size == 0:
            rows.append(missing("update_rms", "no gradient has reached it", layer=layer))
            continue
        values = [(sum(one[i][0] for one in known) / size) ** 0.5 for i in range(len(known[0]))]
        low, high = (min(values), max(values)) if len(values) > 1 else (float("nan"),) * 2
        rows.append(sign_row("update_rms", values[0], layer=layer, low=low, high=high))
        rows.append(sign_row("eps_share", sum(one[0][1] for one in known) / size, layer=layer))
    return rows


def _parameter(kind: str, one: ParameterSettings, g: Tensor) -> tuple[float, float, int]:
    """Sum of g^2 / max(v, eps^2), the entries with sqrt(v) < eps, and how many entries ever had a gradient."""
    moved = advanced(kind, one, g)
    v = moved.moments[MOMENTS[kind]]
    if kind != "rmsprop":
        v = v / (1 - moved.beta2**moved.step)
    live = v > 0
    ratio = g.square() / v.clamp_min(max(one.eps**2, 1e-300))
    hidden = live & (v.sqrt() < one.eps)
    return float(torch.where(live, ratio, 0.0).sum()), float(hidden.sum()), int(live.sum())


def _rates(settings: OptimizerSettings, members: Mapping[str, Sequence[str]]) -> list[StabilityRow]:
    """Each layer's learning rate against the others'; the layers that do not move have none."""
    rates = {}
    for layer, names in members.items():
        own = [settings.parameters[name].lr for name in names if name in settings.parameters]
        if own and max(own) > 0:
            rates[layer] = max(own)
    if len(rates) < 2:
        return []
    middle = statistics.median_low(rates.values())
    return [
        sign_row("learning_rate_ratio", rate / middle, layer=layer, reason=f"learning rate {rate:g}, median {middle:g}")
        for layer, rate in rates.items()
    ]
