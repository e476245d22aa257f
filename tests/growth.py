"""How fast a perturbation along the top direction really grows: the optimizer's own steps on a real network.

The loss is tilted by a linear term, so that the start is a stationary point (its Hessian stays what it is), and the
unperturbed trajectory is subtracted. What the theory freezes is put back before every step: second moments and the
step count of bias correction. The momentum starts on the dominant eigenvector of the linearised step. What is measured
is the coefficient x_k of the top direction.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import curvscope
from curvscope.curvature.extremes import Pair
from curvscope.graph.functional import Graph
from curvscope.graph.prepare import prepare
from curvscope.graph.sites import LayerSpec
from curvscope.load import check_targets, load_problem
from curvscope.load.optimizer_settings import OptimizerSettings, ParameterSettings, optimizer_settings
from curvscope.load.problem import OptimizerState
from curvscope.measure.network import Network, Vector
from curvscope.measure.preconditioner import Preconditioner, preconditioner
from curvscope.measure.sharpness import Space, preconditioned, sharpness
from curvscope.measure.update import denominator
from curvscope.settings import Settings

SAMPLES = Path(__file__).parent.parent / "sample_models"
WITHOUT_DIAGONAL = ("kfac", "shampoo")
# The largest entry the perturbation ever has: small beside the kinks of a ReLU network, far above rounding.
SIZE = 1e-8
STEPS = 10
Make = Callable[[Iterable[Any], float], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "SGD with L2 decay": lambda p, lr: torch.optim.SGD(p, lr=lr, weight_decay=0.5),
    "heavy ball 0.9": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "heavy ball, dampening": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.8, dampening=0.3),
    "Nesterov 0.9": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "NAdam": lambda p, lr: torch.optim.NAdam(p, lr=lr),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
    "RMSprop, momentum": lambda p, lr: torch.optim.RMSprop(p, lr=lr, momentum=0.9),
    "Adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=lr),
}


@dataclass
class Sample:
    """A network in float64 on its own batch, with plain autograd for its gradient."""

    network: Network
    graph: Graph
    gradient: Callable[[Vector], dict[str, Tensor]]

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in self.network.parameters.items()}


def load_sample(name: str) -> Sample:
    problem = load_problem(SAMPLES / f"{name}.pt")
    prepared = prepare(problem, Settings(dtype="float64"), torch.device("cpu"), torch.float64)
    graph, flat = prepared.graph, prepared.flat
    tensors = [t.double() if t.is_floating_point() else t for t in flat.tensors]
    with torch.no_grad():
        loss = check_targets(problem.loss, graph.function({}, tensors), problem.targets)
    network = Network(graph, tensors, loss, problem.targets)
    return as_sample(network, graph)


def as_sample(network: Network, graph: Graph) -> Sample:
    def gradient(parameters: Vector) -> dict[str, Tensor]:
        fresh = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            outputs = graph.function(fresh, network.tensors)
        value = network._value(outputs)
        return dict(zip(fresh, torch.autograd.grad(value, list(fresh.values())), strict=True))

    return Sample(network, graph, gradient)


def warmed(sample: Sample, make: Make, steps: int = 30) -> OptimizerState:
    """The state after real steps with learning rate 0 on noisy gradients, the parameters unchanged."""
    parameters = {name: nn.Parameter(p.clone()) for name, p in sample.network.parameters.items()}
    optimizer = make(parameters.values(), 0.0)
    generator = torch.Generator().manual_seed(0)
    gradient = sample.network.gradient()
    scale = torch.cat([g.flatten() for g in gradient.values()]).square().mean().sqrt()
    for _ in range(steps):
        for name, p in parameters.items():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.grad = gradient[name] * (1 + noise) + 0.3 * scale * noise
        optimizer.step()
    return OptimizerState(type(optimizer).__name__, tuple(parameters), optimizer.state_dict())


@dataclass(frozen=True)
class Top:
    """The linearisation: settings at some learning rate, P, the top pair, its direction u and dual w = H u."""

    settings: OptimizerSettings
    P: Preconditioner
    pair: Pair
    u: dict[str, Tensor]
    w: dict[str, Tensor]


def top_direction(sample: Sample, state: OptimizerState, lr: float, **more: Any) -> Top:
    options = {"lr": lr, **more.pop("options", {})}
    settings = optimizer_settings(state, sample.shapes, options)
    assert settings is not None
    assert settings.problem == ""
    P = preconditioner(settings, list(sample.shapes), **more)
    assert isinstance(P, Preconditioner), P
    space = Space.of(sample.network, P.names)
    product = sample.network.hessian_product()
    matvec = preconditioned(product, sample.network, space, P)
    pair = sharpness(matvec, space, tolerance=1e-7, max_products=300).top[0]
    assert pair.converged
    u = P.inverse_root(space.split(pair.vector))
    zeros = {name: torch.zeros_like(p) for name, p in sample.network.parameters.items()}
    image = product({**zeros, **u})
    w = {name: image[name] + P.l2[name] * u[name] for name in u}
    return Top(settings, P, pair, u, w)


def predicted_root(top: Top) -> complex:
    """The dominant eigenvalue of the linearised step."""
    step, h = top.P.step, top.pair.value
    pull = step.averaged * step.entering + step.direct
    trace = step.retained + 1 - step.decay - step.lr * pull * h
    determinant = step.retained * (1 - step.decay - step.lr * step.direct * h)
    root = cmath.sqrt(trace**2 / 4 - determinant)
    return max(trace / 2 + root, trace / 2 - root, key=abs)


def measured_growth(sample: Sample, state: OptimizerState, make: Make, top: Top, steps: int = STEPS) -> float:
    """The growth factor a step of the coefficient along u under real optimizer steps.

    A real dominant root: the geometric mean of |x_{k+1} / x_k|. A complex pair turns as it grows: then the
    root of D_{k+1} / D_k, D_k = x_{k+1}^2 - x_k x_{k+2} (it is multiplied by the product of the pair each step).
    """
    root, step = predicted_root(top), top.P.step
    start = step.entering * top.pair.value / (root - step.retained) if step.retained else 0.0
    largest = max(float(tensor.abs().max()) for tensor in top.u.values())
    eps = SIZE / largest / max(1.0, abs(root)) ** steps
    pushed = _trajectory(sample, state, make, top, eps, complex(start).real, steps)
    still = _trajectory(sample, state, make, top, 0.0, 0.0, steps)
    length = sum(float((top.w[name] * top.u[name]).sum()) for name in top.u)
    x = [
        sum(float((top.w[name] * (p[name] - q[name])).sum()) for name in top.u) / length
        for p, q in zip(pushed, still, strict=True)
    ]
    if abs(complex(root).imag) < 1e-9:
        return abs(x[-1] / x[1]) ** (1 / (len(x) - 2))
    D = [x[k + 1] ** 2 - x[k] * x[k + 2] for k in range(len(x) - 2)]
    return abs(D[-1] / D[0]) ** (1 / (2 * (len(D) - 1)))


def _trajectory(
    sample: Sample, state: OptimizerState, make: Make, top: Top, eps: float, buffer: float, steps: int
) -> list[dict[str, Tensor]]:
    origin = sample.network.parameters
    slope = sample.gradient(origin)
    names = list(top.u)
    fixed = {name: p for name, p in origin.items() if name not in top.u}
    parameters = {name: nn.Parameter(origin[name] + eps * top.u[name]) for name in names}
    optimizer = make(parameters.values(), top.settings.parameters[names[0]].lr)
    # the gradient that decay asks for, so that the start stays put: decoupled decay is not divided by P
    balance = {
        name: one.decoupled * _P(top, name) + (not one.decoupled)
        for name, one in top.settings.parameters.items()
        if name in names
    }
    stored = dict(zip(state.param_names, state.state_dict["state"].values(), strict=False))
    frozen = {name: {key: _copy(value) for key, value in stored.get(name, {}).items()} for name in names}
    for name, p in parameters.items():
        optimizer.state[p] = {key: _copy(value) for key, value in frozen[name].items()}
        _place_momentum(optimizer.state[p], top, name, eps * buffer)
        if "exp_avg" in optimizer.state[p]:
            one = top.settings.parameters[name]
            optimizer.state[p]["exp_avg"] -= one.decoupled * one.weight_decay * balance[name] * origin[name]
    found = [{name: p.detach().clone() for name, p in parameters.items()}]
    for _ in range(steps):
        gradient = sample.gradient({**fixed, **{name: p.detach() for name, p in parameters.items()}})
        for name, p in parameters.items():
            one = top.settings.parameters[name]
            p.grad = gradient[name] - slope[name] - one.weight_decay * balance[name] * origin[name]
            _freeze(optimizer.state[p], frozen[name], p.grad, one)
        optimizer.step()
        found.append({name: p.detach().clone() for name, p in parameters.items()})
    return found


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _place_momentum(entry: dict[str, Any], top: Top, name: str, size: float) -> None:
    """The momentum on the eigenvector: of gradients (P u) for Adam, of steps (u) for the others."""
    if "exp_avg" in entry:
        entry["exp_avg"] = size * _P(top, name) * top.u[name]
    elif top.P.step.retained:
        entry["momentum_buffer"] = size * top.u[name]


def _P(top: Top, name: str) -> Tensor | float:
    if top.settings.kind in WITHOUT_DIAGONAL:
        return 1.0
    P = denominator(top.settings.kind, top.settings.parameters[name])
    return 1.0 if P is None else P


def _freeze(entry: dict[str, Any], frozen: Mapping[str, Any], gradient: Tensor, one: ParameterSettings) -> None:
    """Second moments and counts such that the coming step arrives at the frozen ones."""
    # at the start what L2 decay adds cancels the tilt
    seen = gradient if one.decoupled or not one.weight_decay else 0 * gradient
    if "step" in frozen:
        entry["step"] = frozen["step"] - 1
    for key in ("exp_avg_sq", "square_avg"):
        if key in frozen:
            entry[key] = (frozen[key] - (1 - one.beta2) * seen.square()) / one.beta2
    if "sum" in frozen:
        entry["sum"] = frozen["sum"] - seen.square()
    if "mu_product" in frozen:
        entry["mu_product"] = frozen["mu_product"] / (one.beta1 * (1 - 0.5 * 0.96 ** (one.step * one.momentum_decay)))


class FrozenKfac(torch.optim.Optimizer):
    """K-FAC with frozen factors, a reference: -lr (B (x) A + damping I)^{-1} grad, dense for every layer."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        layers: Mapping[str, tuple[LayerSpec, Tensor, Tensor]],
        damping: float,
        names: list[str],
    ) -> None:
        super().__init__(list(params), {"lr": lr, "damping": damping})
        self.names = names
        self.inverses = {
            name: torch.linalg.inv(torch.kron(B, A) + damping * torch.eye(len(A) * len(B), dtype=A.dtype))
            if len(A) * len(B) <= 1500
            else None
            for name, (_, A, B) in layers.items()
        }
        self.layers, self.damping = layers, damping

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        given = dict(zip(self.names, group["params"], strict=True))
        for name, (spec, A, B) in self.layers.items():
            weight = given[spec.weight]
            g = weight.grad.flatten(1)
            if spec.bias is not None:
                g = torch.cat([g, given[spec.bias].grad[:, None]], dim=1)
            inverse = self.inverses[name]
            if inverse is not None:
                step = (inverse @ g.flatten()).view_as(g)
            else:
                a, U = torch.linalg.eigh(A)
                b, V = torch.linalg.eigh(B)
                step = V @ ((V.T @ g @ U) / (torch.outer(b, a) + self.damping)) @ U.T
            weight -= group["lr"] * step[:, : g.shape[1] - (spec.bias is not None)].reshape(weight.shape)
            if spec.bias is not None:
                given[spec.bias].sub_(group["lr"] * step[:, -1])


def growths(sample: Sample, make: Make, factor: float, **more: Any) -> tuple[Top, float, float]:
    """The linearisation at `factor` times the largest stable rate, predicted and measured growth."""
    state = warmed(sample, make) if "state" not in more else more.pop("state")
    first = top_direction(sample, state, 1e-3, **more)
    lr = factor * first.P.step.stable_lr(first.pair.value)
    top = top_direction(sample, state, lr, **more)
    return top, top.P.step.growth(top.pair.value), measured_growth(sample, state, make, top)


def kfac_growths(sample: Sample, run: curvscope.Run, damping: float, factor: float) -> tuple[Top, float, float]:
    """As `growths`, for K-FAC-expand with the run's frozen factors; embeddings and other parameters stay fixed."""
    pairs = {name: layer.factors for name, layer in run.layers.items() if "expand" in layer.factors}
    factors = {name: pair for name, pair in pairs.items() if pair["expand"].A.ndim == 2}
    specs = {name: sample.graph.layers[name] for name in factors}
    layers = {
        name: (specs[name], torch.tensor(each["expand"].A).double(), torch.tensor(each["expand"].B).double())
        for name, each in factors.items()
    }
    names = [one for spec in specs.values() for one in (spec.weight, spec.bias) if one is not None]
    group = {"lr": 0.1, "damping": damping, "params": list(range(len(names)))}
    state = OptimizerState("KFAC", tuple(names), {"state": {}, "param_groups": [group]})

    def make(params: Iterable[Any], lr: float) -> torch.optim.Optimizer:
        return FrozenKfac(params, lr, layers, damping, names)

    return growths(sample, make, factor, state=state, specs=specs, factors=factors)
