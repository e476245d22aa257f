"""The whole network's loss as a function of all trained parameters, with its gradient and curvature products.

Everything is exact (no draws) and in the run's dtype. Vectors are mappings from parameter name to tensor. The products
are reverse mode twice: the model's parameters are never written to, so a changed loss is a forward pass on tensors of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvscope.graph.functional import Graph
from curvscope.graph.layout import Layout
from curvscope.load.problem import Loss

Vector = Mapping[str, Tensor]


class Network:
    """L(theta) on the batch.

    Attributes:
        parameters: the trained parameters that the forward pass reaches, by name, detached.
        passes: forward and backward passes taken so far, each counted as one.
    """

    def __init__(self, graph: Graph, tensors: Sequence[Tensor], loss: Loss, targets: Any) -> None:
        self.graph = graph
        self.tensors = list(tensors)
        self._loss = loss
        self.targets = targets
        self.passes = 0
        trained = {name: p.detach() for name, p in graph.parameters.items() if graph.requires_grad[name]}
        self.parameters = trained
        reached = self._gradient(allow_unused=True)
        self.parameters = {name: trained[name] for name in trained if reached[name] is not None}
        self._gradient_found = {name: g for name, g in reached.items() if g is not None}

    def outputs(self, parameters: Vector | None = None) -> Tensor:
        """The model's output at `parameters` (those missing keep their values)."""
        self.passes += 1
        # fused attention has no second derivative
        with sdpa_kernel(SDPBackend.MATH):
            return self.graph.function(dict(parameters or {}), self.tensors)

    def loss(self, parameters: Vector | None = None) -> float:
        """L at `parameters`: a forward pass, in the run's dtype, the loss itself in float64 where it allows that."""
        with torch.no_grad():
            outputs = self.outputs(parameters)
            return float(self._value(outputs))

    def moved(self, step: Vector, length: float = 1.0) -> dict[str, Tensor]:
        """Theta + length * step."""
        return {name: self.parameters[name] + length * step[name].to(self.parameters[name]) for name in step}

    def gradient(self) -> dict[str, Tensor]:
        """dL/dtheta."""
        return dict(self._gradient_found)

    def hessian_product(self) -> Callable[[Vector], dict[str, Tensor]]:
        """V -> H v, H = d^2 L / d theta^2 over all trained parameters; the graph is built once and kept."""
        with torch.enable_grad():
            fresh = self._fresh()
            value = self._value(self.outputs(fresh))
            first = torch.autograd.grad(value, list(fresh.values()), create_graph=True)
        self.passes += 1
        wanted = [g for g in first if g.requires_grad]
        names = [name for name, g in zip(fresh, first, strict=True) if g.requires_grad]

        def product(vector: Vector) -> dict[str, Tensor]:
            self.passes += 2
            given = [vector[name].to(self.parameters[name]) for name in names]
            if not wanted:
                return {name: torch.zeros_like(p) for name, p in self.parameters.items()}
            found = torch.autograd.grad(wanted, list(fresh.values()), given, retain_graph=True, allow_unused=True)
            return self._filled(fresh, found)

        return product

    def ggn_product(self) -> Callable[[Vector], dict[str, Tensor]]:
        """V -> G v, G = J^T (d^2 L / d f^2) J; the graph is built once and kept.

        J v is the derivative of `u -> J^T u` applied to v (reverse mode twice), the middle factor a product with the
        loss's Hessian in the outputs.
        """
        return self._ggn()[0]

    def ggn_form(self) -> Callable[[Vector], float]:
        """V -> v^T G v, added up in float64: one pass each, as J v is all it takes."""
        return self._ggn()[1]

    def _ggn(self) -> tuple[Callable[[Vector], dict[str, Tensor]], Callable[[Vector], float]]:
        """Both operations on one kept graph."""
        fresh, outputs, dummy, pulled, leaf, slope = self._linearized()
        self.passes += 1
        names = [name for name, p in zip(fresh, pulled, strict=True) if p is not None and p.requires_grad]
        wanted = [p for p in pulled if p is not None and p.requires_grad]

        def pushed(vector: Vector) -> tuple[Tensor, Tensor]:
            given = [vector[name].to(self.parameters[name]) for name in names]
            (tangent,) = torch.autograd.grad(wanted, dummy, given, retain_graph=True)
            if not slope.requires_grad:
                return tangent, torch.zeros_like(tangent)
            return tangent, torch.autograd.grad(slope, leaf, tangent, retain_graph=True)[0]

        def product(vector: Vector) -> dict[str, Tensor]:
            self.passes += 3
            _, middle = pushed(vector)
            found = torch.autograd.grad(outputs, list(fresh.values()), middle, retain_graph=True, allow_unused=True)
            return self._filled(fresh, found)

        def form(vector: Vector) -> float:
            self.passes += 1
            tangent, middle = pushed(vector)
            return float((tangent.double() * middle.double()).sum())

        return product, form

    def _linearized(
        self,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, tuple[Tensor | None, ...], Tensor, Tensor]:
        """Fresh parameters, outputs, u and J^T u to differentiate by it, and the outputs as a leaf with dL/df."""
        with torch.enable_grad():
            fresh = self._fresh()
            outputs = self.outputs(fresh)
            dummy = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(outputs, list(fresh.values()), dummy, create_graph=True, allow_unused=True)
            leaf = outputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self._value(leaf), leaf, create_graph=True)
        return fresh, outputs, dummy, pulled, leaf, slope

    def example_curvature(self, vector: Vector, layout: Layout) -> Tensor:
        """v^T G_n v of every example [N], float64: their sum is v^T G v; `layout` is that of the outputs."""
        fresh, _, dummy, pulled, leaf, slope = self._linearized()
        self.passes += 2
        wanted = [(name, p) for name, p in zip(fresh, pulled, strict=True) if p is not None and p.requires_grad]
        wanted = [(name, p) for name, p in wanted if name in vector]
        given = [vector[name].to(self.parameters[name]) for name, _ in wanted]
        (pushed,) = torch.autograd.grad([p for _, p in wanted], dummy, given)
        if not slope.requires_grad:
            return layout.flat(torch.zeros_like(pushed)).sum(1, dtype=torch.float64)
        (middle,) = torch.autograd.grad(slope, leaf, pushed)
        return layout.flat(pushed * middle).sum(1, dtype=torch.float64)

    def _value(self, outputs: Tensor) -> Tensor:
        try:
            return self._loss(outputs.double(), _double(self.targets))
        except (RuntimeError, TypeError, ValueError):
            return self._loss(outputs, self.targets)

    def _fresh(self) -> dict[str, Tensor]:
        return {name: p.detach().requires_grad_() for name, p in self.parameters.items()}

    def _gradient(self, *, allow_unused: bool) -> dict[str, Tensor | None]:
        with torch.enable_grad():
            fresh = self._fresh()
            value = self._value(self.outputs(fresh))
            found = torch.autograd.grad(value, list(fresh.values()), allow_unused=allow_unused)
        self.passes += 1
        return dict(zip(fresh, found, strict=True))

    def _filled(self, fresh: Vector, found: Sequence[Tensor | None]) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(p) if g is None else g.detach()
            for (name, p), g in zip(fresh.items(), found, strict=True)
        }


def _double(targets: Any) -> Any:
    return targets.double() if isinstance(targets, Tensor) and targets.is_floating_point() else targets


def dot(left: Vector, right: Vector) -> float:
    """The inner product over all parameters both have, added up in float64."""
    return float(sum((left[name].double() * right[name].double()).sum() for name in left if name in right))


def norm(vector: Vector) -> float:
    """The 2-norm over all parameters."""
    return dot(vector, vector) ** 0.5


def combined(left: Vector, right: Vector, scale: float = 1.0) -> dict[str, Tensor]:
    """Left + scale * right, over the names of left; those that right lacks count as zero there."""
    return {name: tensor + scale * right[name] if name in right else tensor for name, tensor in left.items()}
