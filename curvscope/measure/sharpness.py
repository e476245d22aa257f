"""Largest eigenvalues of the network's Hessian and GGN, whole or a layer's block, plain or preconditioned.

Operators act on one float64 vector, the named parameters one after the other. A layer's block is the product with
everything else zero, so that it costs what the whole network's does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.curvature.extremes import Extremes, extremes
from curvscope.measure.network import Network, Vector
from curvscope.measure.preconditioner import Preconditioner

Product = Callable[[Vector], dict[str, Tensor]]


@dataclass(frozen=True)
class Space:
    """The named parameters of a network as one vector."""

    names: tuple[str, ...]
    shapes: dict[str, torch.Size]
    device: torch.device

    @classmethod
    def of(cls, network: Network, names: Sequence[str] | None = None) -> Space:
        """All trained parameters, or those named, in the network's order."""
        kept = [name for name in network.parameters if names is None or name in set(names)]
        first = next(iter(network.parameters.values()))
        return cls(tuple(kept), {name: network.parameters[name].shape for name in kept}, first.device)

    @property
    def size(self) -> int:
        """How many numbers."""
        return sum(shape.numel() for shape in self.shapes.values())

    def join(self, vector: Vector) -> Float64[Tensor, " n"]:
        """The parts as one vector."""
        return torch.cat([vector[name].double().flatten() for name in self.names])

    def split(self, vector: Float64[Tensor, " n"]) -> dict[str, Tensor]:
        """The vector as its parts, each in its parameter's shape."""
        parts = vector.split([self.shapes[name].numel() for name in self.names])
        return {name: part.view(self.shapes[name]) for name, part in zip(self.names, parts, strict=True)}


def restricted(product: Product, network: Network, space: Space) -> Callable[[Tensor], Tensor]:
    """The diagonal block of an operator over all parameters that belongs to the space."""
    zeros = {name: torch.zeros_like(p) for name, p in network.parameters.items() if name not in space.shapes}

    def matvec(vector: Tensor) -> Tensor:
        return space.join(product({**zeros, **space.split(vector)}))

    return matvec


def preconditioned(product: Product, network: Network, space: Space, P: Preconditioner) -> Callable[[Tensor], Tensor]:
    """The map y -> P^{-1/2} (H + wd) P^{-1/2} y on the space, wd what L2 decay adds to H."""
    plain = restricted(product, network, space)
    decays = any(P.l2[name] for name in space.names)

    def matvec(vector: Tensor) -> Tensor:
        inner = P.inverse_root(space.split(vector))
        image = space.split(plain(space.join(inner)))
        if decays:
            image = {name: image[name] + P.l2[name] * inner[name] for name in image}
        return space.join(P.inverse_root(image))

    return matvec


def decay_share(vector: Tensor, value: float, space: Space, P: Preconditioner) -> float:
    """The part of an eigenvalue of P^{-1/2} (H + wd) P^{-1/2} that is weight decay, y^T P^{-1/2} wd P^{-1/2} y / value.

    Where a weight gets hardly any gradient, P is as small as the decay itself and wd / P large: a curvature of the
    optimizer's own that no batch changes.
    """
    if not any(P.l2[name] for name in space.names) or value <= 0:
        return 0.0
    inner = P.inverse_root(space.split(vector))
    return sum(P.l2[name] * float(part.square().sum()) for name, part in inner.items()) / value


def sharpness(matvec: Callable[[Tensor], Tensor], space: Space, **options: object) -> Extremes:
    """The ends of the spectrum; `options` are those of `extremes`."""
    return extremes(matvec, space.size, device=space.device, **options)  # type: ignore[arg-type]


def energy_shares(vector: Tensor, space: Space, layers: dict[str, Sequence[str]]) -> dict[str, float]:
    """Each layer's share of the squared norm of a vector of the space; they sum to 1 where layers cover it."""
    parts = space.split(vector)
    total = float(vector.square().sum())
    return {
        layer: sum(float(parts[name].square().sum()) for name in names if name in parts) / total
        for layer, names in layers.items()
    }
