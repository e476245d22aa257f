"""What is kept of each layer for steps of the whole network: the inverses of its curvature, small enough to hold all.

A layer without factors (a norm, a position table) takes its exact block in every approximation, and so does a weight of
several roles, whose sum of Kronecker products has no such inverse. What has neither, the uncovered parameters and the
layers that were not selected, stays where it is. An embedding's curvature is that of the tokens that occur; the others
are moved by weight decay alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.inverse import KroneckerInverse, between, exact_inverses
from curvscope.curvature.kronecker import EigenCorrected, Kronecker
from curvscope.extract.collector import Extract
from curvscope.graph.matrix import to_matrix
from curvscope.graph.sites import LayerSpec
from curvscope.measure.approximate import Built
from curvscope.measure.terms import FLAVOURS, terms

EXACT = "ggn"
KRONECKER = tuple(f"{kind}_{flavour}" for kind in ("kfac", "ekfac") for flavour in FLAVOURS)
# Steps of the exact block between two that were kept may be off by this share in an eigendirection.
BETWEEN_ERROR = 1e-2
NO_INVERSE = "the sum of its roles' Kronecker products has no inverse of Kronecker form"


@dataclass(frozen=True)
class LayerPart:
    """One layer's share of every step.

    Attributes:
        spec: the layer.
        inverses: flavour -> one inverse a group; empty for a layer without factors.
        exact: damping -> `(G + lam I)^{-1} R`, for the dampings chosen beforehand; None without exact columns.
        positions: R, the mean number of positions an example.
        notes: what is special about the layer's steps, a clause each.
        tokens: the inputs that inverses and exact steps run over, of an embedding; None: all.
        outside: R [d_out, d_in] at the other inputs, zero at these.
    """

    spec: LayerSpec
    inverses: Mapping[str, Sequence[KroneckerInverse]]
    exact: Mapping[float, Tensor] | None
    positions: float
    notes: tuple[str, ...] = ()
    tokens: Tensor | None = None
    outside: Tensor | None = None

    def step(self, approximation: str, form: str, damping: float) -> Tensor | None:
        """-(M + damping I)^{-1} R as [d_out, d_in], or None where this layer has no such M or damping."""
        kind, _, flavour = approximation.partition("_")
        if approximation == EXACT or not self.inverses:
            return self._exact_step(damping)
        if kind == "ekfac" and any(one.corrected is None for one in self.inverses[flavour]):
            return None
        pieces = [
            one.apply(damping, ekfac=kind == "ekfac", factored=form == "factored") for one in self.inverses[flavour]
        ]
        found = -(pieces[0] if len(pieces) == 1 else torch.cat(pieces))
        if self.outside is None:
            return found
        (one,) = self.inverses[flavour]
        factored = form == "factored" and kind != "ekfac"
        return self._widened(found, -one.apply_outside(self.outside, damping, factored=factored))

    def _widened(self, step: Tensor, rest: Tensor) -> Tensor:
        """A step over the tokens that occur, with that of the others."""
        assert self.tokens is not None
        rest[:, self.tokens] = step.to(rest)
        return rest

    def _exact_step(self, damping: float) -> Tensor | None:
        """The exact block's step: one that was kept, or between those as `inverse.between` says."""
        if self.exact is None:
            return None
        if self.outside is not None:
            inside = dataclasses.replace(self, outside=None)._exact_step(damping)
            return None if inside is None else self._widened(inside, -self.outside / damping)
        if damping in self.exact:
            return -self.exact[damping]
        weights, error = between(damping, tuple(sorted(self.exact)))
        if error > BETWEEN_ERROR:
            return None
        nodes = torch.stack([self.exact[node].double() for node in sorted(self.exact)])
        return -torch.tensordot(torch.tensor(weights, dtype=nodes.dtype, device=nodes.device), nodes, dims=1)


@dataclass
class Keeper:
    """Takes what is needed of each layer while its columns are there.

    Attributes:
        gradient: the whole network's dL/dtheta, by parameter.
        parameters: theta itself.
        rates: the optimizer's L2 decay of each parameter; empty without one.
        dampings: those at which the exact block's steps are kept; empty: none are.
        eps: of the run's dtype.
        parts: what was kept, by layer.
        traces: tr G of the layers whose exact block was there.
    """

    gradient: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]
    rates: Mapping[str, float]
    dampings: Sequence[float]
    eps: float
    parts: dict[str, LayerPart] = field(default_factory=dict)
    traces: dict[str, float] = field(default_factory=dict)

    def keep(
        self, extract: Extract, blocks: Sequence[Block], built: Sequence[Mapping[str, Built]], fisher: str
    ) -> None:
        """Keep one layer; `built` are its groups' approximations, empty where there were no exact columns."""
        spec, scale = extract.spec, extract.unit**-2
        if not any(name in self.gradient for name in parameters_of(spec)):
            return
        gradient = to_matrix(spec, self.gradient).double()
        decay = self._rates(spec) * to_matrix(spec, self.parameters).double()
        right = gradient + decay
        outside: Tensor | None = None
        if extract.tokens is not None:
            outside = right.index_fill(1, extract.tokens, 0.0)
            gradient, decay, right = (each[:, extract.tokens] for each in (gradient, decay, right))
        height = spec.d_out // spec.groups
        inverses: dict[str, list[KroneckerInverse]] = {}
        for flavour in extract.factors:
            source = "expand" if extract.single else flavour
            if source in inverses:
                inverses[flavour] = inverses[source]
                continue
            inverses[flavour] = [
                KroneckerInverse.of(
                    *_bases(extract, built, source, group),
                    right=side,
                    scale=scale,
                    inputs=None if extract.tokens is None else spec.d_in,
                )
                for group, side in enumerate(right.split(height))
            ]
        exact = None
        # drawn columns are good enough only where there is nothing else
        usable = blocks and (fisher == "exact" or spec.exact_only) and self.dampings
        if usable:
            found = [
                exact_inverses(block, one, other, self.dampings, scale=scale, eps=self.eps)
                for block, one, other in zip(blocks, gradient.split(height), decay.split(height), strict=True)
            ]
            joined = torch.cat(found, dim=1).to(self.gradient[spec.weight].dtype)
            exact = dict(zip(self.dampings, joined, strict=True))
        self.parts[spec.name] = LayerPart(
            spec, inverses, exact, extract.positions, _notes(spec, inverses, exact), extract.tokens, outside
        )
        if blocks and fisher == "exact":
            self.traces[spec.name] = scale * sum(block.trace for block in blocks)

    def _rates(self, spec: LayerSpec) -> Tensor:
        """The L2 decay of every entry of the layer."""
        names = [name for name in parameters_of(spec) if name in self.parameters]
        filled = {name: torch.full_like(self.parameters[name], self.rates.get(name, 0.0)) for name in names}
        return to_matrix(spec, filled).double()


def parameters_of(spec: LayerSpec) -> list[str]:
    """The names of the parameters that a layer holds."""
    return list(spec.members) if spec.exact_only else [spec.weight] + ([spec.bias] if spec.bias else [])


def _bases(
    extract: Extract, built: Sequence[Mapping[str, Built]], flavour: str, group: int
) -> tuple[Kronecker, Tensor | None]:
    """One group's Kronecker product with its eigenbases, where they were computed already, and EKFAC's diagonal."""
    if built:
        kronecker = built[group][f"kfac_{flavour}"].approximation
        corrected = built[group][f"ekfac_{flavour}"].approximation
        assert isinstance(kronecker, Kronecker) and isinstance(corrected, EigenCorrected)
        return kronecker, corrected.scale
    (term,) = terms(extract)[flavour]
    return term.of_group(group).product, None


def _notes(
    spec: LayerSpec, inverses: Mapping[str, Sequence[KroneckerInverse]], exact: Mapping[float, Tensor] | None
) -> tuple[str, ...]:
    if spec.roles and exact is not None:
        return (f"{spec.name} takes its exact block: {NO_INVERSE}",)
    zero = [flavour for flavour, each in inverses.items() if any(one.pi is None for one in each)]
    return (f"{spec.name} has a zero factor ({', '.join(zero)}), where factored damping is undefined",) if zero else ()
