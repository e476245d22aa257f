"""The whole network's loss as a function of all trained parameters, with its gradient and curvature products.

Everything is exact (no draws), in the run's dtype, and a sum over the pieces that the examples come in. The graph that
a product runs on is kept where there is one piece; several pieces' graphs are built one after the other, and where
memory runs out over smaller ones. Vectors are mappings from parameter name to tensor. The products are reverse mode
twice: the model's parameters are never written to, so a changed loss is a forward pass on tensors of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvscope.errors import out_of_memory
from curvscope.extract.examples import Examples
from curvscope.extract.footprint import release
from curvscope.extract.pieces import Piece
from curvscope.graph.functional import Graph

Vector = Mapping[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class _Look:
    """What the first pass finds on a piece; `squares` are those of the outputs, added up."""

    value: float
    gradient: dict[str, Tensor]
    squares: float
    outputs: int

    def __add__(self, other: _Look) -> _Look:
        return _Look(
            self.value + other.value,
            _added(self.gradient, other.gradient),
            self.squares + other.squares,
            self.outputs + other.outputs,
        )


@dataclass(frozen=True)
class _Joined:
    """Numbers of single examples: those of two pieces stand one after the other."""

    values: Tensor

    def __add__(self, other: _Joined) -> _Joined:
        return _Joined(torch.cat([self.values, other.values]))


class Network:
    """L(theta) on the examples.

    Attributes:
        parameters: the trained parameters that the forward pass reaches, by name, detached.
        value: L at these.
        scale: the root mean square of all outputs.
        passes: forward and backward passes over all examples taken so far, each counted as one.
    """

    def __init__(self, graph: Graph, examples: Examples) -> None:
        self.graph = graph
        self.examples = examples
        self.passes = 0
        self._held: Piece | None = None
        trained = {name: p.detach() for name, p in graph.parameters.items() if graph.requires_grad[name]}
        self.parameters = trained
        first = self._summed(self._look, 2)
        self.value, self._gradient_found = first.value, first.gradient
        self.scale = (first.squares / first.outputs) ** 0.5
        self.parameters = {name: trained[name] for name in trained if name in first.gradient}

    def pieces(self) -> Iterable[Piece]:
        """The pieces, read anew; the one of them where there is no other."""
        if not self.examples.alone:
            self._held = None
            return self.examples
        if self._held is None:
            (self._held,) = self.examples
        return (self._held,)

    def outputs(self, piece: Piece, parameters: Vector | None = None) -> Tensor:
        """The model's outputs on a piece at `parameters` (those missing keep their values)."""
        return differentiable(self.graph, parameters or {}, piece.tensors)

    def loss(self, parameters: Vector | None = None) -> float:
        """L at `parameters`: a forward pass, in the run's dtype, the loss itself in float64 where it allows that."""

        def visit(piece: Piece) -> float:
            with torch.no_grad():
                return float(self._value(self.outputs(piece, parameters), piece)) if piece.counts else 0.0

        return self._summed(visit, 1)

    def moved(self, step: Vector, length: float = 1.0) -> dict[str, Tensor]:
        """Theta + length * step."""
        return {name: self.parameters[name] + length * step[name].to(self.parameters[name]) for name in step}

    def gradient(self) -> dict[str, Tensor]:
        """dL/dtheta."""
        return dict(self._gradient_found)

    def hessian_product(self) -> Callable[[Vector], dict[str, Tensor]]:
        """V -> H v, H = d^2 L / d theta^2 over all trained parameters."""
        return self._operator(self._hessian, build=2, apply=2)

    def ggn_product(self) -> Callable[[Vector], dict[str, Tensor]]:
        """V -> G v, G = J^T (d^2 L / d f^2) J.

        J v is the derivative of `u -> J^T u` applied to v (reverse mode twice), the middle factor a product with the
        loss's Hessian in the outputs.
        """
        return self._operator(lambda piece: self._ggn(piece)[0], build=2, apply=3)

    def ggn_form(self) -> Callable[[Vector], float]:
        """V -> v^T G v, added up in float64: one pass each, as J v is all it takes."""
        return self._operator(lambda piece: self._ggn(piece)[1], build=2, apply=1)

    def example_curvature(self, vector: Vector) -> Tensor:
        """v^T G_n v of every example [N], float64: their sum is v^T G v."""

        def visit(piece: Piece) -> _Joined:
            layout = piece.layouts.output
            if not piece.counts:
                return _Joined(torch.zeros(piece.layouts.examples, dtype=torch.float64, device=piece.tensors[0].device))
            names, wanted, dummy, slope, leaf, _, _ = self._linearized(piece)
            given = [vector[name].to(self.parameters[name]) for name in names if name in vector]
            kept = [p for name, p in zip(names, wanted, strict=True) if name in vector]
            (pushed,) = torch.autograd.grad(kept, dummy, given)
            if not slope.requires_grad:
                return _Joined(layout.flat(torch.zeros_like(pushed)).sum(1, dtype=torch.float64))
            (middle,) = torch.autograd.grad(slope, leaf, pushed)
            return _Joined(layout.flat(pushed * middle).sum(1, dtype=torch.float64))

        return self._summed(visit, 3).values

    def _operator(
        self, make: Callable[[Piece], Callable[[Vector], T]], *, build: int, apply: int
    ) -> Callable[[Vector], T]:
        """The sum over the pieces of what `make` gives of each; one piece's is made once and kept, with its graph."""
        kept: list[Callable[[Vector], T]] = []

        def product(vector: Vector) -> T:
            def visit(piece: Piece) -> T:
                if not self.examples.alone:  # what was kept, if anything, is of a piece as it was before
                    kept.clear()
                    return make(piece)(vector)
                if not kept:
                    kept.append(make(piece))
                return kept[0](vector)

            return self._summed(visit, apply if kept else build + apply, kept.clear)

        return product

    def gathered(
        self,
        start: Callable[[], T],
        take: Callable[[T, Piece], T],
        passes: int,
        forget: Callable[[], None] = lambda: None,
    ) -> T:
        """What `take` makes of `start()` and every piece in turn; again over smaller ones where memory runs out.

        `passes` is what it counts for; `forget` drops what was kept of a piece as it was.
        """
        while True:
            try:
                found = start()
                for piece in self.pieces():
                    found = take(found, piece)
                self.passes += passes
                return found
            except Exception as error:
                if not out_of_memory(error) or not self.examples.halve():
                    raise
            # outside of the handler: the failed pass's tensors go with its traceback
            forget()
            release()

    def _summed(self, visit: Callable[[Piece], T], passes: int, forget: Callable[[], None] = lambda: None) -> T:
        """What `visit` returns, added up over the pieces."""

        def take(total: Any, piece: Piece) -> Any:
            return visit(piece) if total is None else _added(total, visit(piece))

        return self.gathered(lambda: None, take, passes, forget)

    def _look(self, piece: Piece) -> _Look:
        """Loss, gradient and outputs' size of one piece."""
        if not piece.counts:
            with torch.no_grad():
                outputs = self.outputs(piece)
            return _Look(0.0, {}, float(outputs.double().square().sum()), outputs.numel())
        with torch.enable_grad():
            fresh = self._fresh()
            outputs = self.outputs(piece, fresh)
            value = self._value(outputs, piece)
            found = torch.autograd.grad(value, list(fresh.values()), allow_unused=True)
        gradient = {name: g for name, g in zip(fresh, found, strict=True) if g is not None}
        outputs = outputs.detach()
        return _Look(float(value.detach()), gradient, float(outputs.double().square().sum()), outputs.numel())

    def _hessian(self, piece: Piece) -> Callable[[Vector], dict[str, Tensor]]:
        """V -> H v of one piece, on a graph that is built here."""
        if not piece.counts:
            return self._zeros
        with torch.enable_grad():
            fresh = self._fresh()
            value = self._value(self.outputs(piece, fresh), piece)
            first = torch.autograd.grad(value, list(fresh.values()), create_graph=True, allow_unused=True)
        found = [(name, g) for name, g in zip(fresh, first, strict=True) if g is not None and g.requires_grad]
        names, wanted = [name for name, _ in found], [g for _, g in found]

        def product(vector: Vector) -> dict[str, Tensor]:
            if not wanted:
                return self._zeros(vector)
            given = [vector[name].to(self.parameters[name]) for name in names]
            second = torch.autograd.grad(wanted, list(fresh.values()), given, retain_graph=True, allow_unused=True)
            return self._filled(fresh, second)

        return product

    def _ggn(self, piece: Piece) -> tuple[Callable[[Vector], dict[str, Tensor]], Callable[[Vector], float]]:
        """V -> G v and v^T G v of one piece, both on one graph."""
        if not piece.counts:
            return self._zeros, lambda vector: 0.0
        names, wanted, dummy, slope, leaf, fresh, outputs = self._linearized(piece)

        def pushed(vector: Vector) -> tuple[Tensor, Tensor]:
            given = [vector[name].to(self.parameters[name]) for name in names]
            (tangent,) = torch.autograd.grad(wanted, dummy, given, retain_graph=True)
            if not slope.requires_grad:
                return tangent, torch.zeros_like(tangent)
            return tangent, torch.autograd.grad(slope, leaf, tangent, retain_graph=True)[0]

        def product(vector: Vector) -> dict[str, Tensor]:
            _, middle = pushed(vector)
            found = torch.autograd.grad(outputs, list(fresh.values()), middle, retain_graph=True, allow_unused=True)
            return self._filled(fresh, found)

        def form(vector: Vector) -> float:
            tangent, middle = pushed(vector)
            return float((tangent.double() * middle.double()).sum())

        return product, form

    def _linearized(
        self, piece: Piece
    ) -> tuple[list[str], list[Tensor], Tensor, Tensor, Tensor, dict[str, Tensor], Tensor]:
        """J^T u (by name), u to differentiate it by, dL/df with the outputs as a leaf, parameters and outputs."""
        with torch.enable_grad():
            fresh = self._fresh()
            outputs = self.outputs(piece, fresh)
            dummy = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(outputs, list(fresh.values()), dummy, create_graph=True, allow_unused=True)
            leaf = outputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self._value(leaf, piece), leaf, create_graph=True)
        found = [(name, p) for name, p in zip(fresh, pulled, strict=True) if p is not None and p.requires_grad]
        return [name for name, _ in found], [p for _, p in found], dummy, slope, leaf, fresh, outputs

    def _value(self, outputs: Tensor, piece: Piece) -> Tensor:
        """The piece's part of L."""
        loss, targets = self.examples.loss, piece.targets
        try:
            value = loss(outputs.double(), _double(targets))
        except (RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            value = loss(outputs, targets)
        return value if piece.share == 1.0 else value * piece.share

    def _fresh(self) -> dict[str, Tensor]:
        return {name: p.detach().requires_grad_() for name, p in self.parameters.items()}

    def _zeros(self, vector: Vector) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    def _filled(self, fresh: Vector, found: Sequence[Tensor | None]) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(p) if g is None else g.detach()
            for (name, p), g in zip(fresh.items(), found, strict=True)
        }


def differentiable(graph: Graph, parameters: Vector, tensors: Sequence[Tensor]) -> Tensor:
    """The model's outputs at `parameters` (those missing keep their values), to be differentiated twice."""
    # fused attention has no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        return graph.function(dict(parameters), list(tensors))


def _added(left: Any, right: Any) -> Any:
    """Left + right; vectors name by name, over the names of both."""
    if not isinstance(left, Mapping):
        return left + right
    return {**right, **{name: tensor + right[name] if name in right else tensor for name, tensor in left.items()}}


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
