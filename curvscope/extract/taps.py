"""Exact columns of parameters without a Kronecker form, from the gradients that their taps see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvscope.extract.collector import Columns, Extract, Form
from curvscope.extract.counts import RowCounts
from curvscope.extract.replayed import Replayed
from curvscope.extract.symmetric import BlockSum
from curvscope.graph.layout import Layout
from curvscope.graph.sites import LayerSpec
from curvscope.graph.tap import Tap
from curvscope.graph.verify import Layouts


class TapCollector:
    """`Collector` for a layer of taps: its column is the gradient of all members together, [N, P]."""

    def __init__(self, spec: LayerSpec, layouts: Layouts, form: Form | None, factors: bool, per_draw: bool) -> None:
        self.spec = spec
        self.form = form
        self.count = 0
        self.examples = layouts.examples
        self.like = layouts.outputs
        self.layouts = {site.target: layouts.sites[site.target] for site in spec.sites}
        self.taps = {site.target: site.module for site in spec.sites}
        self.extra: dict[str, list[Any]] = {}
        self.replayed: dict[str, list[Replayed | None]] = {}
        self.sum: Tensor | None = None
        self.values: dict[str, Tensor] = {}
        self.pulls = {name: pull for site in spec.sites for name, pull in site.module.pulls.items()}
        self.column: int | None = None
        self.gradient: Tensor | None = None
        self.kept: list[Tensor] = []
        self.squares: Tensor | None = None
        self.whole_examples = layouts.examples
        self.block: BlockSum | None = None
        self.formed_draws = 0
        self.undecided = False

    def begin(self, stored: Mapping[str, Any], columns: int) -> None:
        """Take what the forward pass left at the taps."""
        self.count = columns
        for target in self.taps:
            module: Any = stored[target]
            self.like = module.output
            self.extra[target] = []
            while hasattr(module, f"input{len(self.extra[target]) + 1}"):
                given = getattr(module, f"input{len(self.extra[target]) + 1}")
                self.extra[target].append(given.detach() if isinstance(given, Tensor) else given)
            self.replayed[target] = replayed_members(module, self.extra[target], module.output, self.layouts[target])

    def start(self, column: int | None) -> None:
        """The next gradients belong to this column; None: to the loss itself."""
        self.column = column
        self.sum = None
        self.values = {}

    def receive(self, target: str, gradient: Tensor) -> None:
        """One tap's output gradient of this pass."""
        tap = self.taps[target]
        assert isinstance(tap, Tap)
        found = tap_gradients(tap, gradient, self.extra[target], self.layouts[target], self.replayed[target])
        for name in [name for name in found if name in self.pulls]:
            value = found.pop(name)
            self.values[name] = self.values[name] + value if name in self.values else value
        if found:
            self._add(found)

    def _add(self, found: Mapping[str, Tensor]) -> None:
        """Gradients of some members, [N, size] each."""
        like = next(iter(found.values()))
        pieces = [found.get(name, like.new_zeros(self.examples, size)) for name, size in self.spec.members.items()]
        column = torch.cat(pieces, dim=1)
        self.sum = column if self.sum is None else self.sum + column

    def finish(self) -> None:
        """All taps of the layer have reported: keep the pass."""
        for name, value in self.values.items():
            self._add(self.pulls[name](value))
        if self.sum is None:
            self.sum = torch.zeros(self.examples, self.spec.parameters, dtype=self.like.dtype, device=self.like.device)
        if self.column is None:
            self.gradient = self.sum.sum(0, keepdim=True)
            each = self.sum.unflatten(0, (self.whole_examples, -1)).sum(1)
            self.squares = each.square().sum(1, dtype=torch.float64)
        elif self.form == "formed":
            if self.block is None:
                self.block = BlockSum(self.sum.shape[1], self.formed_draws, self.sum.device)
            self.block.add(self.column, self.sum)
        elif self.form is not None:
            self.kept.append(self.sum)

    def result(self, masks: Mapping[str, Tensor]) -> Extract:
        """The exact columns; there are no factors."""
        columns = None
        if self.block is not None:
            columns = Columns("formed", self.examples, self.count, block=self.block.result())
        elif self.kept:
            columns = Columns("dense", self.examples, self.count, values=torch.stack(self.kept).unsqueeze(2))
        one = torch.ones(self.whole_examples)
        rows = RowCounts.of(one, one, 1)
        return Extract(
            self.spec, self.examples, 1.0, 0.0, {}, self.gradient, columns, example_squares=self.squares, counts=rows
        )


def replayed_members(tap: Tap, extra: Sequence[Any], output: Tensor, layout: Layout) -> list[Replayed | None]:
    """For every member of a tap the operation that has to be run again for it; None for those with a rule."""
    rest = list(extra)
    found: list[Replayed | None] = []
    for member in tap.members:
        taken, rest = rest[: len(member.operands)], rest[len(member.operands) :]
        found.append(None if member.replay is None else Replayed(member.replay, taken, output, layout))
    return found


def tap_gradients(
    tap: Tap, gradient: Tensor, extra: Sequence[Any], layout: Layout, replayed: Sequence[Replayed | None]
) -> dict[str, Tensor]:
    """The gradient of every member of a tap for each example, [N, size].

    `g`, `g * other` or `-g`, summed over everything but the example and the entries that were read, and added up at the
    places these have in the parameter; or what autograd says of the operation.
    """
    found: dict[str, Tensor] = {}
    for name, product, places in tap_entries(tap, gradient, extra):
        value = _summed(product, places.shape, layout)
        if places.shape[layout.axis] == 1:
            place = places.reshape(1, -1).expand_as(value)
        else:
            place = layout.split(places).flatten(1)
        total = value.new_zeros(value.shape[0], tap.shapes[name].numel()).scatter_add_(1, place, value)
        found[name] = found[name] + total if name in found else total
    for member, again in zip(tap.members, replayed, strict=True):
        if again is not None:
            total, name = again.gradients(gradient), member.parameter
            found[name] = found[name] + total if name in found else total
    return found


def tap_entries(tap: Tap, gradient: Tensor, extra: Sequence[Any]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of every member with a rule: its name, what is added to its gradient, and at which of its entries.

    The second is shaped like `gradient`, the third broadcasts to that.
    """
    rest = list(extra)
    for member in tap.members:
        taken, rest = rest[: len(member.operands)], rest[len(member.operands) :]
        if member.replay is not None:
            continue
        product = -gradient if member.role == "minus" else gradient
        if member.other is not None:
            product = gradient * taken.pop(0).conj()
        shape = tap.shapes[member.parameter]
        if member.index is not None:
            places = taken.pop(0).long()
        else:
            places = torch.arange(shape.numel(), device=gradient.device).view(shape)
        if member.channels_first:
            places = places.view(-1, *[1] * (product.ndim - 2))
        yield member.parameter, product, places.view([1] * (product.ndim - places.ndim) + list(places.shape))


def _summed(product: Tensor, shape: torch.Size, layout: Layout) -> Tensor:
    """The product summed over what the parameter is broadcast over, for each example: [N, entries read]."""
    examples = layout.split(product)  # [N, *before, outer, inner, *after]
    axis = layout.axis
    own = [1, 1] if shape[axis] == 1 else list(examples.shape[axis + 1 : axis + 3])
    return examples.sum_to_size([examples.shape[0], *shape[:axis], *own, *shape[axis + 1 :]]).flatten(1)
