"""What gradient clipping and a learning rate schedule make of the stability verdict.

Clipping by norm (torch.nn.utils.clip_grad_norm_) multiplies the whole gradient by `s = min(1, c / |g|)` before the
optimizer sees it: H becomes s H, while weight decay, which the optimizer adds itself, stays. With P frozen and |g|
taken as constant the threshold is compared with the top eigenvalue of P^{-1} (s H + wd); for wd = 0 that is the plain
sharpness against threshold / s. Neither assumption lasts: as |g| falls, s rises to 1; and once the step along the top
direction dominates the gradient, its length is bounded by the clip, so that the iterate swings instead of diverging.

A schedule changes rates (and momenta) with the threshold; sharpness and moments are taken as they are today.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from curvscope.load.optimizer_settings import OptimizerSettings, ParameterSettings
from curvscope.load.problem import Schedule
from curvscope.measure.preconditioner import Preconditioner
from curvscope.measure.stability import Spread, verdict
from curvscope.measure.thresholds import Dynamics, dynamics
from curvscope.records import NAN, StabilityRow

CLIP = "torch.nn.utils.clip_grad_norm_"
SCHEDULE = "torch.optim.lr_scheduler, run ahead"
# What torch adds to the norm before it divides.
GUARD = 1e-6
REMEMBERS = ("adam", "adamw", "nadam", "rmsprop", "adagrad")


def norm_of(gradient: Mapping[str, Tensor]) -> float:
    """The norm of all of a gradient's parts together."""
    return float(sum(float(part.double().square().sum()) for part in gradient.values())) ** 0.5


def clip_scale(norm: float, bound: float | None) -> float:
    """The factor min(1, bound / norm) that clipping by norm puts on the gradient, as torch computes it; 1 without."""
    return 1.0 if bound is None else min(1.0, bound / (norm + GUARD))


def clipped(gradient: Mapping[str, Tensor], bound: float | None) -> Mapping[str, Tensor]:
    """The gradient as clipping by norm leaves it."""
    scale = 1.0 if bound is None else clip_scale(norm_of(gradient), bound)
    return gradient if scale == 1.0 else {name: scale * part for name, part in gradient.items()}


def clipped_rows(
    settings: OptimizerSettings,
    P: Preconditioner,
    plain: Spread,
    short: Spread,
    norm: float,
    *,
    lr: float,
    halved: bool,
) -> list[StabilityRow]:
    """The verdict with clipping, given the spread of P^{-1} (H + wd) and that of P^{-1} (s H + wd).

    `clip_scale` is s; `clipped_sharpness` the plain sharpness with the threshold that clipping makes of the plain one;
    `clipped_growth` and `clipped_stable_lr` as their plain counterparts. Where s is 1 there is the first row only.
    """
    bound = settings.clip
    assert bound is not None
    scale = clip_scale(norm, bound)
    said = f"the gradient's norm is {norm:.3g} here, its bound {bound:g}"
    first = StabilityRow("network", "", "clip_scale", scale, source=CLIP, reason=said)
    if scale == 1.0:
        return [first]
    step = P.step
    # so that value over threshold is what the clipped step sees
    unit = plain.value / short.value if plain.value > 0 < short.value else 1 / scale
    found = verdict(short, step.threshold, halved=halved, joint=not P.fixed)

    def row(quantity: str, values: tuple[float, float, float], threshold: float, reason: str = "") -> StabilityRow:
        value, low, high = values
        return StabilityRow(
            "network",
            "",
            quantity,
            value,
            low,
            high,
            threshold,
            found,
            source=CLIP,
            status="ok" if short.converged else "not_converged",
            reason=reason,
        )

    low, high = short.bounds
    lasts = _lasts(settings, plain, step.threshold, norm)
    rows = [
        row("clipped_sharpness", (unit * short.value, unit * low, unit * high), unit * step.threshold, lasts),
        row("clipped_stable_lr", (_rate(step, short.value), _rate(step, high), _rate(step, low)), lr),
    ]
    if short.converged and not P.momentum_differs:
        growth = (_growth(step, short.value), _growth(step, low), _growth(step, high))
        rows.append(row("clipped_growth", growth, 1.0))
    return [first, *rows]


def _growth(step: Dynamics, value: float) -> float:
    return NAN if math.isnan(value) else step.growth(value)


def _rate(step: Dynamics, value: float) -> float:
    return NAN if math.isnan(value) else step.stable_lr(value)


def _lasts(settings: OptimizerSettings, plain: Spread, threshold: float, norm: float) -> str:
    """What the verdict with clipping assumes."""
    words = f"holds while the gradient's norm stays near {norm:.3g}"
    if plain.value > threshold and settings.clip is not None:
        words += f": under {settings.clip * plain.value / threshold:.3g} the bound no longer makes up for the rate"
    if settings.kind in REMEMBERS:
        words += (
            "; the stored second moments are taken as they are: had earlier gradients been clipped less than this one, "
            "they would shrink, and the sharpness rise towards that without clipping"
        )
    return words


def scheduled_row(
    settings: OptimizerSettings, P: Preconditioner, spread: Spread, *, halved: bool
) -> StabilityRow | None:
    """Whether the schedule leads to rates that today's sharpness does not bear; None without a schedule.

    `scheduled_peak_lr` is the rate (of the group with the largest one now) at the tightest step ahead, the one where
    the threshold is lowest; `threshold` the largest stable rate there. Where groups change by different factors the
    verdict rests on the least and the most of them.
    """
    plan = settings.schedule
    if plan is None:
        return None
    moving = {name: settings.parameters[name] for name in P.names}
    main = max(moving, key=lambda name: moving[name].lr)
    if len(plan.rates) == 1 and plan.problem:
        return StabilityRow(
            "network", "", "scheduled_peak_lr", NAN, status="not_assessed", reason=f"{plan.name}: {plan.problem}"
        )
    one_a_group = {one.group: one for one in moving.values()}
    factors = torch.stack([_threshold_factors(settings.kind, one, plan) for one in one_a_group.values()])
    least, most = factors.amin(0), factors.amax(0)
    at = int(least.argmin())
    ahead = _ahead(settings.kind, moving[main], plan, at)
    tightest = dynamics(settings.kind, ahead)
    stable = tightest.stable_lr(spread.value)
    if float(least[at]) >= 1 - 1e-9:
        at, ahead, stable = 0, moving[main], P.step.stable_lr(spread.value)
    threshold = P.step.threshold
    sides = [verdict(spread, threshold * float(ends[at]), halved=halved, joint=not P.fixed) for ends in (least, most)]
    # below needs the lowest threshold that may hold, above the highest
    found = sides[0] if sides[0] == "below" else sides[1] if sides[1] == "above" else "undecided"
    return StabilityRow(
        "network",
        "",
        "scheduled_peak_lr",
        ahead.lr,
        threshold=stable,
        verdict=found,
        source=SCHEDULE,
        status="ok" if spread.converged else "not_converged",
        reason=_when(plan, at, least * threshold, spread.value),
    )


def _ahead(kind: str, one: ParameterSettings, plan: Schedule, at: int) -> ParameterSettings:
    """The settings of a parameter so many scheduler steps ahead."""
    momenta = plan.momenta[:, one.group]
    changed = {"lr": float(plan.rates[at, one.group])}
    if bool((momenta != momenta[0]).any()) and not bool(momenta.isnan().any()):
        changed["beta1" if kind in ("adam", "adamw", "nadam") else "momentum"] = float(momenta[at])
    return dataclasses.replace(one, **changed)  # type: ignore[arg-type]


def _threshold_factors(kind: str, one: ParameterSettings, plan: Schedule) -> Tensor:
    """The threshold of a parameter at each step ahead over that of now, [steps + 1]."""
    pairs = torch.stack([plan.rates[:, one.group], plan.momenta[:, one.group]], dim=1)
    known: dict[tuple[float, float], float] = {}
    now = dynamics(kind, one).threshold
    found = torch.empty(len(pairs), dtype=torch.float64)
    for k, (rate, momentum) in enumerate(pairs.tolist()):
        key = (rate, momentum if momentum == momentum else 0.0)
        if key not in known:
            known[key] = dynamics(kind, _ahead(kind, one, plan, k)).threshold / now
        found[k] = known[key]
    return found


def _when(plan: Schedule, at: int, thresholds: Tensor, sharpness: float) -> str:
    """Where the tightest step lies, and from where on the threshold is passed, in words."""
    if plan.assumed:
        return f"{plan.name}: {plan.problem}"
    reach = f" of the next {len(plan.rates) - 1:,}" if plan.cut else ""
    if at == 0:
        return f"{plan.name}: no step ahead{reach} is less stable than this one"
    words = f"{plan.name}: in {at:,} scheduler steps{reach}, with today's sharpness and moments"
    passed = (thresholds < sharpness).nonzero()
    if len(passed) and 0 < int(passed[0]) < at:
        words += f"; over the threshold from step {int(passed[0]):,} on"
    return words
