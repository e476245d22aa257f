"""The ends of the Hessian's spectrum on all examples and on halves of them, within bounds on time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvscope.curvature.extremes import Extremes
from curvscope.measure.halves import Half
from curvscope.measure.network import Network
from curvscope.measure.preconditioner import Preconditioner
from curvscope.measure.room import BASIS_BYTES
from curvscope.measure.sharpness import Product, Space, preconditioned, restricted, sharpness
from curvscope.measure.stability import Spread

MOST_PRODUCTS = 100
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-4}


@dataclass(frozen=True)
class Wanted:
    """How much to spend, and on what precision; the defaults are those of the run's dtype.

    Without an optimizer there is nothing to judge: then only `full` measures halves and layers. `together` says that
    the graphs of all examples and of the halves may be kept side by side.
    """

    seed: int = 0
    full: bool = False
    seconds: float = 15.0
    memory_bytes: int = 2 * BASIS_BYTES
    basis_bytes: int = BASIS_BYTES
    together: bool = True
    tolerance: float | None = None
    most_products: int = MOST_PRODUCTS


@dataclass
class Spreads:
    """The spectrum's ends on all examples and on both halves, each halves' loss on the scale of all.

    Attributes:
        network: the loss on all examples.
        wanted: what may be spent.
        parts: the halves; `no_parts` says why there are none.
        P: the preconditioner, where there is one.
        deadline: of `time.monotonic`.
        factor: the Hessian is multiplied by it, as by gradient clipping.
    """

    network: Network
    wanted: Wanted
    parts: list[Half]
    no_parts: str
    P: Preconditioner | None
    deadline: float = 0.0
    factor: float = 1.0
    products: dict[int, Product] = field(default_factory=dict)

    @property
    def networks(self) -> list[Network]:
        """The loss on all examples, then on the halves."""
        return [self.network, *(half.network for half in self.parts)]

    def product(self, index: int) -> Product:
        """The Hessian product of all examples (0) or a half, on the scale of all, its graph built when first wanted."""
        if index not in self.products:
            if not self.wanted.together:
                self.products.clear()
            scale = self.factor * (self.parts[index - 1].scale if index else 1.0)
            self.products[index] = _scaled(self.networks[index].hessian_product(), scale)
        return self.products[index]

    def ggn(self, space: Space) -> Extremes:
        """The largest eigenvalue of the GGN on all examples."""
        if not self.wanted.together:
            self.products.clear()
        return self.extremes(restricted(self.network.ggn_product(), self.network, space), space)

    def extremes(self, matvec: Callable[[Tensor], Tensor], space: Space, **options: int) -> Extremes:
        """The ends of an operator's spectrum within the bounds."""
        kind = next(iter(self.network.parameters.values())).dtype
        return sharpness(
            matvec,
            space,
            seed=self.wanted.seed,
            tolerance=self.wanted.tolerance or TOLERANCES.get(kind, 1e-3),
            max_products=self.wanted.most_products,
            deadline=self.deadline,
            basis_bytes=self.wanted.basis_bytes,
            **options,
        )

    def on(self, index: int, space: Space, P: Preconditioner | None, **options: int) -> Extremes:
        """The ends of the (preconditioned) Hessian's spectrum on all examples or a half."""
        network = self.networks[index]
        if P is None or P.identity:
            return self.extremes(restricted(self.product(index), network, space), space, **options)
        return self.extremes(preconditioned(self.product(index), network, space, P), space, **options)

    def spread(self, space: Space, P: Preconditioner | None, whole: Extremes | None = None) -> tuple[Spread, Extremes]:
        """On all examples and both halves."""
        whole = whole or self.on(0, space, P)
        parts = [self.on(index + 1, space, P) for index in range(len(self.parts))]
        return Spread.of(whole, parts), whole

    @property
    def late(self) -> bool:
        """Whether the time is spent."""
        return time.monotonic() > self.deadline


def _scaled(product: Product, scale: float) -> Product:
    """Scale times the operator."""
    if scale == 1.0:
        return product
    return lambda vector: {name: scale * tensor for name, tensor in product(vector).items()}
