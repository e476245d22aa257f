"""The rows that speak of damping and of the steps an optimizer takes with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from curvscope.records.layers import NAN


@dataclass(frozen=True)
class DampingRow:
    """One damped step of one layer: what the optimizer would do with this approximation and this damping.

    With g the layer's gradient (plus weight decay times the weights, where the optimizer adds it), mu = damping +
    weight decay, delta = -(M + mu I)^{-1} g (form eigenbasis; factored: -((B + sqrt(mu)/pi I) (x) (A + pi sqrt(mu)
    I))^{-1} g) and exact = -(G + mu I)^{-1} g: angle and length ratio of delta and exact; predicted_decrease =
    -(g.delta + delta^T (G + decay) delta / 2), damping left out of the model; decrease_share = that over exact's; rho =
    that over what M in place of G predicts; effective_dimension = tr M (M + mu)^{-1}; gradient_distance = ||mu delta +
    g|| / ||g||; alpha_star = -g.delta / (delta^T (G + mu) delta); condition = that of (M + mu)^{-1/2} (G + mu) (M +
    mu)^{-1/2}, at the marked values only. `relative` is damping / (tr G / P); `mark` says current (the optimizer's
    own), recommended, or nothing.
    """

    layer: str
    approximation: str
    form: str
    damping: float = NAN
    relative: float = NAN
    mark: str = ""
    angle_degrees: float = NAN
    length_ratio: float = NAN
    predicted_decrease: float = NAN
    decrease_share: float = NAN
    rho: float = NAN
    effective_dimension: float = NAN
    angle_to_gradient_degrees: float = NAN
    gradient_distance: float = NAN
    alpha_star: float = NAN
    condition: float = NAN
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class RangeRow:
    """Which damping one layer's approximation can take.

    From `low` on the Levenberg-Marquardt ratio rho stays at 1/4 or more; up to `high` gradient_distance is 1/10 or
    more: the step still differs from plain gradient descent. NaN: as far as the grid goes. `recommended` has the
    largest decrease of the exact quadratic model, `decrease`; `gain` = 1 - (decrease at `current`) / `decrease`.
    Below `noise_below` noise is amplified: effective_dimension >= 0.9 min(P, N K) and alpha_star < 1/4. `standing` is
    where the current value is: too_small, safe, too_large, or empty. `form_gap` = 1 - smaller / larger decrease of the
    forms eigenbasis and factored, at the current value (unknown: at the one recommended for the eigenbasis). `joint`
    is the value to set where all layers step together by this approximation, `recommended` times the factor of
    `GlobalDampingRow`; NaN where their step does no better than that of one value for all, or is not known: the clause
    of the reason that begins with "joint:" says why.
    """

    layer: str
    approximation: str
    form: str
    current: float = NAN
    low: float = NAN
    high: float = NAN
    recommended: float = NAN
    decrease: float = NAN
    gain: float = NAN
    noise_below: float = NAN
    standing: str = ""
    form_gap: float = NAN
    joint: float = NAN
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class StepRow:
    """One damped step of the whole network, delta = -(M + damping I)^{-1} (grad L + w theta), w the L2 decay.

    predicted_change = R . delta + delta^T (G + w) delta / 2 with the exact GGN of the whole network; actual_change by a
    forward pass; rho = actual_change / predicted_change; length factors are multiples of the step, `alpha_star` =
    -R . delta / delta^T (G + w) delta the one at which the model is lowest. `role` is grid, current (the optimizer's
    own damping), recommended and safest (`damping` and `safe_damping` of `GlobalDampingRow`), or boundary (tried to
    find where the safe range begins); relative_damping is damping over the mean eigenvalue of G, with a standard error
    where that is estimated.
    """

    approximation: str
    form: str
    damping: float
    role: str
    relative_damping: float = NAN
    relative_damping_stderr: float = NAN
    predicted_change: float = NAN
    actual_change: float = NAN
    rho: float = NAN
    step_norm: float = NAN
    angle_to_gradient_degrees: float = NAN
    alpha_star: float = NAN
    best_step_length: float = NAN
    best_length_change: float = NAN
    model_length: float = NAN
    passes: int = 0
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class GlobalDampingRow:
    """What the steps of one approximation and form say of damping: one value for all layers, or one for each.

    Changes are those of the objective by one step. `damping`, the recommended one, has the lowest objective of all
    tried, safe or not (`recommended_is_safe`; the reason says so where it is not). Every damping judged from
    `safe_from` on has rho >= 1/4 and a predicted decrease (the Levenberg-Marquardt rule); safe_*: that of them with the
    lowest objective. From `lowerable_from` on rho > 3/4; from `gradient_from` on the step points within 18 degrees of
    the negative gradient.
    per_layer_*: every layer at the damping that its own block recommends (`RangeRow.recommended`), all times
    `per_layer_factor`, chosen by the same rule; per_layer_gain = per_layer_change / change - 1, the share by which that
    lowers the objective more than one value does. current_*: at the optimizer's own damping.
    """

    approximation: str
    form: str
    damping: float = NAN
    relative_damping: float = NAN
    relative_damping_stderr: float = NAN
    change: float = NAN
    predicted_change: float = NAN
    rho: float = NAN
    safe_from: float = NAN
    safe_damping: float = NAN
    safe_change: float = NAN
    safe_rho: float = NAN
    lowerable_from: float = NAN
    gradient_from: float = NAN
    per_layer_predicted: float = NAN
    per_layer_change: float = NAN
    per_layer_rho: float = NAN
    per_layer_factor: float = NAN
    per_layer_gain: float = NAN
    current: float = NAN
    current_change: float = NAN
    current_rho: float = NAN
    current_alpha_star: float = NAN
    passes: int = 0
    status: str = "ok"
    reason: str = ""

    @property
    def recommended_is_safe(self) -> bool:
        """Whether the recommended damping is in the safe range."""
        return self.damping >= self.safe_from

    @property
    def by_layer(self) -> bool:
        """Whether a damping for each layer lowers the objective more than the recommended one for all."""
        return self.per_layer_gain > 0 or (math.isnan(self.damping) and self.per_layer_change < 0)


def leading(rows: Sequence[GlobalDampingRow]) -> GlobalDampingRow | None:
    """The K-FAC (eigenbasis form) that report and findings speak of: recommended with the lowest objective of both.

    None where no K-FAC took steps.
    """
    known = [
        row
        for row in rows
        if row.form == "eigenbasis" and row.approximation.startswith("kfac") and row.status in ("ok", "estimated")
    ]
    return min(known, key=lambda row: math.inf if math.isnan(row.change) else row.change, default=None)


@dataclass(frozen=True)
class EvidenceRow:
    """The Laplace log evidence of the training set at one precision of a Gaussian prior on the Kronecker layers.

    log_evidence = -nll - precision ||theta||^2 / 2 + sum log(precision / (scale lambda + precision)) / 2 over the P
    eigenvalues lambda of M; effective_parameters = sum scale lambda / (scale lambda + precision); weight_decay =
    precision / scale, the L2 decay (not AdamW's) with the same optimum. `role` is grid or maximum.
    """

    approximation: str
    role: str
    precision: float = NAN
    log_evidence: float = NAN
    effective_parameters: float = NAN
    weight_decay: float = NAN
    nll: float = NAN
    scale: float = NAN
    parameters: int = 0
    status: str = "ok"
    reason: str = ""
