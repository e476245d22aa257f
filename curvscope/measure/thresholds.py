"""Where each optimizer becomes unstable, and how fast it then diverges: the linearised step along one eigenvector.

With moments frozen and P constant, every optimizer here moves the coordinate x along an eigenvector of P^{-1} H
(eigenvalue h) by the same two lines, d the decoupled decay lr wd:

    m' = retained m + entering h x
    x' = (1 - d) x - lr (averaged m' + direct h x)

The eigenvalues of that 2x2 matrix leave the unit circle through -1 (0 <= retained < 1, h > 0), where the sign of x
flips from step to step. Setting one of them to -1 gives the threshold on h

    (2 - d) (1 + retained) / (lr (averaged entering + direct (1 + retained))),

which is 2/lr for SGD, 2 (1 + beta) / ((1 - tau) lr) for heavy ball, 2 (1 + beta) / ((1 + 2 beta) lr) for Nesterov's
method, (2 + 2 beta1) / ((1 - beta1) lr) for Adam and (1 + beta1) (2 - lr wd) / ((1 - beta1) lr) for AdamW. The growth
factor is the spectral radius: with momentum it is reached after some steps only.

Sources: edge of stability arXiv:2103.00065; preconditioned, for Adam arXiv:2207.14484.
"""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass

from curvscope.load.optimizer_settings import ParameterSettings

EDGE = "arXiv:2103.00065"
ADAPTIVE = "arXiv:2207.14484"
# Up to here a trace's square is far from overflow, and beyond it the determinant is lost beside it.
SQUARED = 1e100


@dataclass(frozen=True)
class Dynamics:
    """The coefficients of the linearised step of one optimizer."""

    lr: float
    retained: float = 0.0
    entering: float = 1.0
    averaged: float = 1.0
    direct: float = 0.0
    decay: float = 0.0

    @property
    def threshold(self) -> float:
        """The eigenvalue of P^{-1} H from which on the step is unstable; inf for a learning rate of 0."""
        speed = self.lr * (self.averaged * self.entering + self.direct * (1 + self.retained))
        return float("inf") if speed == 0 else (2 - self.decay) * (1 + self.retained) / speed

    def growth(self, eigenvalue: float) -> float:
        """The factor a step, after the first few, along an eigenvector of this eigenvalue: the spectral radius.

        inf where it is beyond float64.
        """
        trace = self._trace(eigenvalue)
        if math.isnan(trace):
            return float("nan") if math.isnan(eigenvalue) else float("inf")
        if abs(trace) > SQUARED:
            # the determinant is of the trace's order, and nothing beside its square
            return abs(trace)
        determinant = self.retained * (1 - self.decay - self.lr * self.direct * eigenvalue)
        root = cmath.sqrt(trace**2 / 4 - determinant)
        return max(abs(trace / 2 + root), abs(trace / 2 - root))

    def pinned(self, eigenvalue: float) -> bool:
        """Whether the growth is sqrt(retained (1 - d)) here and for all eigenvalues near by: it tells of no margin.

        Where the two eigenvalues of the step are a complex pair, their modulus is the root of the determinant, in which
        h stands only as lr direct h.
        """
        trace = self._trace(eigenvalue)
        return self.direct == 0 and abs(trace) <= SQUARED and trace**2 / 4 < self.retained * (1 - self.decay)

    def _trace(self, eigenvalue: float) -> float:
        pull = self.averaged * self.entering + self.direct
        return self.retained + 1 - self.decay - self.lr * pull * eigenvalue

    def stable_lr(self, eigenvalue: float) -> float:
        """The learning rate at which this eigenvalue is just at the threshold; inf where none is too large."""
        if eigenvalue <= 0:
            return float("inf")
        if self.lr == 0:
            return float("nan")
        speed = self.averaged * self.entering + self.direct * (1 + self.retained)
        # decay = lr wd scales with the rate, too
        return 2 * (1 + self.retained) / (speed * eigenvalue + self.decay / self.lr * (1 + self.retained))


def dynamics(kind: str, one: ParameterSettings) -> Dynamics:
    """The coefficients for one parameter; P is what `preconditioner` makes of the same settings."""
    decay = one.lr * one.weight_decay if one.decoupled else 0.0
    if kind in ("adam", "adamw"):
        return Dynamics(one.lr, one.beta1, 1 - one.beta1, decay=decay)
    if kind == "nadam":
        now, coming = nadam_momenta(one)
        product = float(one.moments["mu_product"])
        return Dynamics(
            one.lr,
            one.beta1,
            1 - one.beta1,
            averaged=coming / (1 - product * coming),
            direct=(1 - now) / (1 - product),
            decay=decay,
        )
    lr = one.lr
    if kind == "adagrad":
        lr /= 1 + max(one.step - 1, 0) * one.lr_decay
    if one.momentum == 0:
        return Dynamics(lr, decay=decay)
    entering = 1 - one.dampening if kind == "sgd" else 1.0
    if one.nesterov:
        return Dynamics(lr, one.momentum, entering, averaged=one.momentum, direct=1.0, decay=decay)
    return Dynamics(lr, one.momentum, entering, decay=decay)


def nadam_momenta(one: ParameterSettings) -> tuple[float, float]:
    """NAdam's mu of the stored step and of the next."""
    now, coming = (one.beta1 * (1 - 0.5 * 0.96 ** ((one.step + k) * one.momentum_decay)) for k in (0, 1))
    return now, coming


def rule(kind: str, one: ParameterSettings) -> str:
    """The threshold in symbols with its source, for tables and pages."""
    if kind in ("adam", "adamw"):
        if one.decoupled and one.weight_decay:
            return f"(1 + beta1)(2 - lr wd)/((1 - beta1) lr), {ADAPTIVE}"
        return f"(2 + 2 beta1)/((1 - beta1) lr), {ADAPTIVE}"
    if kind == "nadam":
        return "eigenvalue -1 of the linearised step (NAdam has no published threshold)"
    if kind in ("rmsprop", "adagrad"):
        return f"2/lr, {ADAPTIVE}" if not one.momentum else f"2(1 + beta)/lr, {ADAPTIVE}"
    if kind in ("kfac", "shampoo"):
        return "2/lr, frozen factors" if not one.momentum else "2(1 + beta)/lr, frozen factors"
    if one.momentum and one.nesterov:
        return f"2(1 + beta)/((1 + 2 beta) lr), {EDGE}"
    if one.momentum:
        return f"2(1 + beta)/((1 - tau) lr), {EDGE}" if one.dampening else f"2(1 + beta)/lr, {EDGE}"
    return f"2/lr, {EDGE}"
