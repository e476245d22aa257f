"""Rows that examples have different numbers of: the nodes and edges of graphs that share one axis."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvscope.graph.layout import Layout


@dataclass(frozen=True, eq=False)
class Ragged(Layout):
    """Axis `axis` holds the rows of all examples, in any order; `places` says whose each is.

    Every example gets `inner` slots, as many as the longest has rows; the slots that an example does not fill hold
    zeros. `places` [rows] is `example * inner + slot` of every row.
    """

    examples: int = 1
    places: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    @classmethod
    def of(cls, axis: int, owner: Tensor, examples: int) -> Ragged:
        """The layout whose row i belongs to example owner[i]; rows keep their order within an example."""
        order = torch.argsort(owner, stable=True)
        counts = torch.bincount(owner, minlength=examples)
        starts = counts.cumsum(0) - counts
        slots = torch.empty_like(owner)
        slots[order] = torch.arange(len(owner), device=owner.device) - starts[owner[order]]
        most = max(1, int(counts.max()))
        return cls(axis, 1, most, examples, owner * most + slots)

    def on_axis(self, axis: int) -> Layout:
        """The same rows on another axis."""
        return Ragged(axis, 1, self.inner, self.examples, self.places)

    def width(self, tensor: Tensor) -> int:
        """How many numbers an example has, its empty slots among them."""
        return tensor.numel() // tensor.shape[self.axis] * self.inner

    def split(self, tensor: Tensor) -> Tensor:
        """The tensor as [N, *axes before, 1, slots, *axes after], zeros in the empty slots."""
        moved = tensor.movedim(self.axis, 0)
        slots = moved.new_zeros(self.examples * self.inner, *moved.shape[1:])
        slots = slots.index_copy(0, self.places.to(moved.device), moved)
        split = slots.unflatten(0, (self.examples, 1, self.inner))
        return split.movedim((1, 2), (self.axis + 1, self.axis + 2))

    def unflat(self, flat: Tensor, like: Tensor) -> Tensor:
        """The inverse of `flat`: [N, everything else] back to the shape of `like`, empty slots left out."""
        rest = [*like.shape[: self.axis], 1, self.inner, *like.shape[self.axis + 1 :]]
        slots = flat.reshape(flat.shape[0], *rest).movedim((self.axis + 1, self.axis + 2), (1, 2)).flatten(0, 2)
        return slots[self.places.to(flat.device)].movedim(0, self.axis).contiguous()

    def real(self, tensor: Tensor, feature_axis: int = -1) -> Tensor | None:
        """Which of the rows [N, R] that `rows` makes of the tensor are rows of it, and not empty slots."""
        marks = torch.ones_like(tensor.select(feature_axis, 0), dtype=torch.bool).unsqueeze(feature_axis)
        return self.rows(marks, feature_axis)[..., 0]
