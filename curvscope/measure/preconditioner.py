"""P of the actual optimizer as P^{-1/2}, an operator on vectors by name, with what differs between its groups in it.

Where groups have thresholds of their own (learning rate, momentum, decoupled decay), P_i is multiplied by threshold_i /
threshold, `threshold` that of the main group: the step then leaves the stable range, through the eigenvalue -1, exactly
where the top eigenvalue of P^{-1} H passes the one threshold. For learning rates alone that is lr / lr_i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvscope.curvature.eigen import eigh
from curvscope.graph.matrix import to_matrix, to_parameters
from curvscope.graph.sites import LayerSpec
from curvscope.load.optimizer_settings import OptimizerSettings, ParameterSettings
from curvscope.measure.network import Vector
from curvscope.measure.thresholds import Dynamics, dynamics
from curvscope.measure.update import ELEMENTWISE, denominator
from curvscope.records import KroneckerFactors

Operator = Callable[[Vector], dict[str, Tensor]]


@dataclass(frozen=True)
class Preconditioner:
    """The optimizer as the linearised step sees it.

    Attributes:
        inverse_root: v -> P^{-1/2} v over `names`, float64.
        names: the parameters that move.
        l2: what weight decay adds to H's diagonal, by name.
        step: the main group's dynamics; `step.threshold` is the threshold on P^{-1} H.
        identity: whether P^{-1/2} is 1 and nothing is added to H.
        momentum_differs: the groups differ in more than rate and decay, so that no single growth factor exists.
        fixed: parameters that the optimizer trains and P does not cover, with the reason.
    """

    inverse_root: Operator
    names: tuple[str, ...]
    l2: Mapping[str, float]
    step: Dynamics
    identity: bool
    momentum_differs: bool
    fixed: tuple[str, ...] = ()
    fixed_reason: str = ""


@dataclass(frozen=True)
class Unassessable:
    """Why there is no P."""

    reason: str


def preconditioner(
    settings: OptimizerSettings,
    names: Sequence[str],
    specs: Mapping[str, LayerSpec] | None = None,
    factors: Mapping[str, Mapping[str, KroneckerFactors]] | None = None,
) -> Preconditioner | Unassessable:
    """P for the parameters `names`; K-FAC's from our own damped factors of each layer, Shampoo's from its state.

    A parameter with learning rate 0 does not move and has no part. P is exact where it is positive; where it is not
    the reason is returned instead.
    """
    if settings.problem:
        return Unassessable(settings.problem)
    moving = {name: settings.parameters[name] for name in names if name in settings.parameters}
    moving = {name: one for name, one in moving.items() if one.lr > 0}
    if not moving:
        return Unassessable("every learning rate is 0, so that nothing moves")
    main = max(moving.values(), key=lambda one: one.lr)
    step = dynamics(settings.kind, main)
    steps = {name: dynamics(settings.kind, one) for name, one in moving.items()}
    if not all(0 < each.threshold < math.inf for each in steps.values()):
        return Unassessable("its settings are unstable by themselves (lr times weight decay of 2 or more)")
    scales = {name: (step.threshold / each.threshold) ** 0.5 for name, each in steps.items()}
    l2 = {name: 0.0 if one.decoupled else one.weight_decay for name, one in moving.items()}
    differs = any(
        (each.retained, each.entering, each.averaged, each.direct)
        != (step.retained, step.entering, step.averaged, step.direct)
        for each in steps.values()
    )
    if settings.kind in ELEMENTWISE:
        diagonal = {name: denominator(settings.kind, one) for name, one in moving.items()}
        for name, P in diagonal.items():
            if P is not None and not bool((P > 0).all() & P.isfinite().all()):
                return Unassessable(f"P of {name} is not positive and finite everywhere (no squared gradient, eps 0)")
        roots = {name: scales[name] if P is None else scales[name] * P.rsqrt() for name, P in diagonal.items()}
        plain = settings.kind == "sgd" and set(scales.values()) == {1.0} and not any(l2.values())

        def elementwise(vector: Vector) -> dict[str, Tensor]:
            return {name: v.double() * on(roots[name], v) for name, v in vector.items()}

        return Preconditioner(elementwise, tuple(moving), l2, step, plain, differs)
    if settings.kind == "shampoo":
        return _shampoo(settings, moving, scales, l2, step, differs)
    return _kfac(settings, moving, scales, l2, step, differs, specs or {}, factors or {})


def on(value: Tensor | float, like: Tensor) -> Tensor | float:
    """The value on the other tensor's device."""
    return value.to(like.device) if isinstance(value, Tensor) else value


def _shampoo(
    settings: OptimizerSettings,
    moving: Mapping[str, ParameterSettings],
    scales: Mapping[str, float],
    l2: Mapping[str, float],
    step: Dynamics,
    differs: bool,
) -> Preconditioner | Unassessable:
    """P^{-1} = the product over the axes of (L_i + damping)^{-1/(2 axes)}, or of the stored inverse roots."""
    roots: dict[str, list[Tensor]] = {}
    for name, one in moving.items():
        order = sum(key.startswith(("factor_", "inverse_")) for key in one.moments)
        roots[name] = []
        for axis in range(order):
            inverse = one.moments.get(f"inverse_{axis}")
            factor = one.moments[f"factor_{axis}"] if inverse is None else inverse
            values, vectors = eigh(factor.double())
            if inverse is None:
                values = values + (settings.damping or 0.0)
            if not float(values.min()) > 0:
                return Unassessable(f"a factor of {name} is not positive definite")
            power = -1 / (4 * order) if inverse is None else 0.5
            roots[name].append((vectors * values**power) @ vectors.T)

    def operator(vector: Vector) -> dict[str, Tensor]:
        found = {}
        for name, given in vector.items():
            tensor = given.double()
            for axis, root in enumerate(roots[name]):
                tensor = torch.tensordot(tensor, on(root, tensor), dims=([axis], [0])).movedim(-1, axis)
            found[name] = scales[name] * tensor
        return found

    return Preconditioner(operator, tuple(moving), l2, step, False, differs)


def _kfac(
    settings: OptimizerSettings,
    moving: Mapping[str, ParameterSettings],
    scales: Mapping[str, float],
    l2: Mapping[str, float],
    step: Dynamics,
    differs: bool,
    specs: Mapping[str, LayerSpec],
    factors: Mapping[str, Mapping[str, KroneckerFactors]],
) -> Preconditioner | Unassessable:
    """P = B (x) A + damping I in the eigenbasis of each layer's factors; parameters of no such layer stay fixed."""
    damping = settings.damping or 0.0
    bases: dict[str, tuple[LayerSpec, Tensor, Tensor, Tensor]] = {}
    for name, spec in specs.items():
        pair = factors.get(name, {}).get(settings.flavour)
        owned = [spec.weight, *([spec.bias] if spec.bias is not None else [])]
        if pair is None or pair.A.ndim != 2 or spec.groups > 1 or not all(one in moving for one in owned):
            continue
        if len({scales[one] for one in owned}) > 1:
            return Unassessable(f"weight and bias of {name} have different learning rates")
        lam_A, U_A = eigh(torch.as_tensor(pair.A).double())
        lam_B, U_B = eigh(torch.as_tensor(pair.B).double())
        damped = torch.outer(lam_B, lam_A) + damping
        if not float(damped.min()) > 0:
            return Unassessable(f"the damped factors of {name} are not positive definite")
        bases[name] = (spec, U_B, U_A, damped.rsqrt())
    covered = [one for spec, *_ in bases.values() for one in (spec.weight, spec.bias) if one is not None]
    if not covered:
        return Unassessable("no layer has Kronecker factors for all its parameters")
    fixed = tuple(name for name in moving if name not in covered)

    def operator(vector: Vector) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        shapes = {name: tensor.shape for name, tensor in vector.items()}
        for spec, U_B, U_A, scale in bases.values():
            if spec.weight not in vector:
                continue
            matrix = to_matrix(spec, vector).double()
            B, A, damped = (on(part, matrix) for part in (U_B, U_A, scale))
            matrix = B @ (damped * (B.T @ matrix @ A)) @ A.T  # type: ignore[union-attr, operator]
            found |= to_parameters(spec, matrix, shapes)
        return {name: scales[name] * tensor for name, tensor in found.items()}

    return Preconditioner(
        operator, tuple(covered), l2, step, False, differs, fixed, "they have no Kronecker factors" if fixed else ""
    )
