"""Damped steps of the whole network: what each would do by the quadratic model, and what it does.

A step is `delta = -(M + lam I)^{-1} R` with M block-diagonal over layers and R = grad L + w theta, w the optimizer's
L2 decay (zero for decoupled decay, which is no part of the loss). Its change by the model is
`R . delta + delta^T (G + w) delta / 2` with the exact GGN of the whole network, the terms between layers included, and
without `lam ||delta||^2 / 2`, as in kfac-jax: then `rho = actual / predicted` tends to 1 as lam grows (Martens and
Grosse, arXiv:1503.05671, section 6.5, include it). The actual change is a forward pass at theta + delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from curvscope.graph.matrix import to_parameters
from curvscope.measure.network import Network, Vector, dot, norm
from curvscope.measure.parts import LayerPart
from curvscope.records import NAN

# rho is a ratio of changes: below this many times their rounding it has no first digit.
NOISE_FACTOR = 10
# The model has stopped describing a step where it is off by this share of the decrease that it predicts.
MODEL_OFF = 0.25
LENGTHS = (1 / 16, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 16.0)


@dataclass(frozen=True)
class Step:
    """One step with its changes of the objective.

    `linear` and `quadratic` are `R . delta` and `delta^T (G + w) delta`; `cosine` that with -R.
    """

    vector: Vector
    linear: float
    quadratic: float
    actual: float
    norm: float
    cosine: float

    @property
    def predicted(self) -> float:
        """The change by the quadratic model."""
        return self.at(1.0)

    @property
    def rho(self) -> float:
        """Actual over predicted change; NaN where nothing is predicted."""
        return self.actual / self.predicted if self.predicted != 0 else NAN

    @property
    def alpha_star(self) -> float:
        """The multiple of the step at which the model is lowest; infinite where it falls for ever."""
        return -self.linear / self.quadratic if self.quadratic > 0 else math.inf

    def at(self, length: float) -> float:
        """The model's change at `length` times the step."""
        return length * self.linear + 0.5 * length**2 * self.quadratic


@dataclass(frozen=True)
class LineSearch:
    """Along one step: where the objective is lowest, its change there, and where the model stops describing it.

    `model_length` is the length from which the actual change is off by more than `MODEL_OFF` of the largest change that
    the model has predicted up to there, interpolated in log length between the lengths tried; `holds` says that it is
    off nowhere up to the longest one, which then is what `model_length` says.
    """

    best_length: float
    best_change: float
    model_length: float
    holds: bool


class Objective:
    """L + sum of w theta^2 / 2 around the present parameters, with the network's quadratic model of it."""

    def __init__(self, network: Network, rates: Mapping[str, float]) -> None:
        self.network = network
        self.rates = {name: rate for name, rate in rates.items() if rate and name in network.parameters}
        self.gradient = network.gradient()
        self.right = {
            name: g + self.rates[name] * network.parameters[name] if name in self.rates else g
            for name, g in self.gradient.items()
        }
        self.value = network.value

    @cached_property
    def form(self) -> Callable[[Vector], float]:
        """V -> v^T G v."""
        return self.network.ggn_form()

    def forget(self) -> None:
        """Free the graph that `form` keeps; it is built anew when wanted."""
        self.__dict__.pop("form", None)

    @cached_property
    def rounding(self) -> float:
        """The size of rounding in a change of the loss: that of the outputs, of the sum over terms, and of theta."""
        eps = max(torch.finfo(p.dtype).eps for p in self.network.parameters.values())
        scale = abs(self.value) + self.network.scale
        return eps * (scale + norm(self.network.parameters) * norm(self.gradient))

    def change(self, vector: Vector, length: float = 1.0) -> float:
        """The actual change: a forward pass at theta + length * vector; NaN where the loss is not finite there."""
        if not vector:
            return 0.0
        found = self.network.loss(self.network.moved(vector, length)) - self.value
        for name, rate in self.rates.items():
            if name in vector:
                theta, delta = self.network.parameters[name].double(), length * vector[name].double()
                found += rate * float((theta * delta).sum() + 0.5 * delta.square().sum())
        return found

    def quadratic(self, vector: Vector) -> float:
        """`delta^T (G + w) delta`."""
        whole = {
            name: vector[name] if name in vector else torch.zeros_like(p) for name, p in self.network.parameters.items()
        }
        squares = {name: float(vector[name].double().square().sum()) for name in self.rates if name in vector}
        return self.form(whole) + sum(self.rates[name] * square for name, square in squares.items())

    @property
    def flat(self) -> bool:
        """Whether the gradient (with the decay's) is zero."""
        return norm(self.right) == 0.0

    def judged(self, vector: Vector) -> Step:
        """The step with its changes, by the model and actual: a product with J and a forward pass."""
        return self.model(vector, self.change(vector))

    def model(self, vector: Vector, actual: float) -> Step:
        """The step with the model's change beside the actual one, known already: a product with J."""
        size, linear = norm(vector), dot(vector, self.right)
        cosine = -linear / (size * norm(self.right)) if linear else NAN
        return Step(vector, linear, self.quadratic(vector), actual, size, cosine)

    def search(self, step: Step) -> LineSearch:
        """The line search along one step: `LENGTHS`, then two points of a parabola in log length around the lowest."""
        found = {1.0: step.actual}
        for length in LENGTHS:
            if length not in found:
                found[length] = self.change(step.vector, length)
        for _ in range(2):
            middle = _lowest(found)
            between = _parabola(found, middle)
            if between is not None and between not in found:
                found[between] = self.change(step.vector, between)
        best = _lowest(found)
        limit, holds = _model_length(step, found, self.rounding)
        return LineSearch(best, found[best], limit, holds)


def _lowest(found: Mapping[float, float]) -> float:
    return min(found, key=lambda length: found[length] if math.isfinite(found[length]) else math.inf)


def _parabola(found: Mapping[float, float], middle: float) -> float | None:
    """The lowest point of the parabola in log length through the lowest value and its neighbours; None at an end."""
    below = max((length for length in found if length < middle), default=None)
    above = min((length for length in found if length > middle), default=None)
    if below is None or above is None or not all(math.isfinite(found[x]) for x in (below, above)):
        return None
    left, right = math.log(below / middle), math.log(above / middle)
    fall, rise = found[below] - found[middle], found[above] - found[middle]
    denominator = left * rise - right * fall
    return None if denominator == 0 else middle * math.exp(0.5 * (left**2 * rise - right**2 * fall) / denominator)


def _model_length(step: Step, found: Mapping[float, float], rounding: float) -> tuple[float, bool]:
    """Where the model is first off by more than `MODEL_OFF`; changes within rounding are not held against it."""
    last, last_off, largest = 0.0, 0.0, 0.0
    lowest_at = step.alpha_star
    for length in sorted(found):
        largest = max(largest, abs(step.at(length)), abs(step.at(lowest_at)) if length > lowest_at else 0.0)
        off = abs(found[length] - step.at(length)) / largest if largest > NOISE_FACTOR * rounding else 0.0
        off = off if math.isfinite(off) else math.inf
        if off > MODEL_OFF:
            if last == 0.0 or not math.isfinite(off):
                return length, False
            share = (MODEL_OFF - last_off) / (off - last_off)
            return last * (length / last) ** share, False
        last, last_off = length, off
    return last, True


def joint_step(
    parts: Sequence[LayerPart],
    shapes: Mapping[str, torch.Size],
    approximation: str,
    form: str,
    damping: Mapping[str, float],
) -> dict[str, Tensor]:
    """The step of all layers together, `damping` by layer; a layer without such an M is left out of it."""
    found: dict[str, Tensor] = {}
    for part in parts:
        matrix = part.step(approximation, form, damping[part.spec.name])
        if matrix is not None:
            pieces = to_parameters(part.spec, matrix, shapes)
            found |= {name: piece for name, piece in pieces.items() if name in shapes}
    return found
