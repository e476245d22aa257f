"""Columns of models that do not mix positions (tokens, pixels): one backward pass serves all positions of an example.

The loss is a sum of terms, one a position, so T (C - 1) columns an example are backpropagated one by one where
positions mix. Where the outputs at position t depend on every layer's row t alone, the passes of all positions can be
one: its gradients g[n, t, j] are those of T separate columns `v[n, (t, j)] = g[n, t, j] (x) a[n, t]`. They are kept
apart, as if every position were an example: adding them over t, as a layer's own sum over positions does, would give
another G (173 % off on a small model) and another B of reduce (276 %).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from curvscope.extract.collector import Collector, Extract, Form
from curvscope.extract.counts import RowCounts
from curvscope.extract.roots import exact_columns, outputs_an_example
from curvscope.extract.rows import SiteRows
from curvscope.extract.symmetric import input_gram
from curvscope.extract.taps import TapCollector, tap_entries
from curvscope.graph.functional import Graph
from curvscope.graph.layout import Layout
from curvscope.graph.sites import LayerSpec, Site
from curvscope.graph.tap import Tap
from curvscope.graph.verify import Independent, Layouts
from curvscope.load.class_axis import class_axis
from curvscope.load.problem import Loss

KNOWN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Tap)


def independent_positions(
    loss: Loss, graph: Graph, tensors: list[Tensor], layouts: Layouts, targets: Any
) -> Independent | None:
    """How the outputs split into positions that do not mix behind any layer, or None.

    Checked, not assumed: for every bit of the position's number, the outputs at the positions with this bit set (and
    then at those without it) are backpropagated with random weights, and the gradients at the rows of all other
    positions must be exactly zero, at every site. Two positions differ in some bit, so no pair escapes. Sites must
    have one row a position, in the same order; grouped convolutions, weights of several roles and other modules than
    linear ones, convolutions and taps rule sharing out. None, too, where it would save no passes.
    """
    for axis in _feature_axes(loss, layouts, targets):
        features = layouts.outputs.shape[axis]
        count = outputs_an_example(layouts.outputs, layouts.output) // features
        columns = features - (loss.name in ("cross_entropy", "causal_lm"))
        checks = 2 * (count - 1).bit_length()
        # the check is not repeated by every layer's sums, so one of its passes counts half
        if (
            count == 1
            or columns == 0
            or exact_columns(loss, layouts.outputs, layouts.output, targets) <= (columns + checks / 2)
        ):
            continue
        taps = _apart(graph, tensors, layouts, axis, count)
        if taps is not None:
            return Independent(axis, count, columns, taps)
    return None


def _feature_axes(loss: Loss, layouts: Layouts, targets: Any) -> list[int]:
    """The axes of the outputs along which one position's numbers may lie."""
    outputs, own = layouts.outputs, layouts.output.axis
    if loss.name in ("cross_entropy", "causal_lm"):
        axes = [class_axis(loss.name, loss.settings, outputs, targets)]
    elif loss.name in ("mse", "bce_with_logits"):
        axes = [outputs.ndim - 1, 1] if outputs.ndim > 2 else [outputs.ndim - 1]
    else:
        return []  # a callable may couple the outputs of different positions
    return [axis for axis in dict.fromkeys(axes) if axis != own]


def _apart(graph: Graph, tensors: list[Tensor], layouts: Layouts, axis: int, count: int) -> dict[str, int] | None:
    """The feature axis of every tap, if no position's outputs depend on another's rows; else None."""
    replayed = any(
        member.replay is not None
        for site in graph.sites()
        if type(site.module) is Tap
        for member in site.module.members
    )
    if replayed or layouts.routed or any(spec.groups > 1 or spec.roles for spec in graph.layers.values()):
        return None
    sites = {site.target: site for site in graph.sites()}
    for target, site in sites.items():
        if type(site.module) not in KNOWN or (type(site.module) is not Tap and layouts.positions[target] != count):
            return None
    kept: dict[str, Tensor] = {}
    handles = []

    def keeper(target: str) -> Any:
        def keep(module: Any, args: Any, result: Tensor) -> None:
            kept[target] = result

        return keep

    try:
        for target, site in sites.items():
            handles.append(site.module.register_forward_hook(keeper(target)))
        with torch.enable_grad():
            output = graph.run(*tensors)
    finally:
        for handle in handles:
            handle.remove()
    kept |= graph.leaves()
    choices = {target: _choices(sites[target], tensor, layouts, count) for target, tensor in kept.items()}
    watched = {target: tensor for target, tensor in kept.items() if tensor.requires_grad}
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(output.shape, generator=generator).to(output)
    of_terms = Layout(layouts.output.axis - (axis < layouts.output.axis), layouts.output.outer, layouts.output.inner)
    numbers = torch.arange(count, device=output.device)
    for bit in range((count - 1).bit_length()):
        for value in (0, 1):
            chosen = (numbers >> bit) % 2 == value
            mask = of_terms.unflat(chosen.expand(layouts.examples, count), weights.select(axis, 0)).unsqueeze(axis)
            found = torch.autograd.grad(
                output, list(watched.values()), weights * mask, retain_graph=True, allow_unused=True
            )
            for target, gradient in zip(watched, found, strict=True):
                if gradient is not None:
                    choices[target] = [
                        one
                        for one in choices[target]
                        if not (_rows(sites[target], gradient, layouts, one)[:, ~chosen] != 0).any()
                    ]
            if not all(choices.values()):
                return None
    return {target: axes[0] for target, axes in choices.items() if type(sites[target].module) is Tap}


def _choices(site: Site, tensor: Tensor, layouts: Layouts, count: int) -> list[int]:
    """The axes that may hold the features of a site's output, such that it has one row a position."""
    if type(site.module) is not Tap:
        return [-1]
    own = layouts.sites[site.target].axis
    axes = [tensor.ndim - 1, 1] if tensor.ndim > 2 else [tensor.ndim - 1]
    sizes = {axis: layouts.examples * count * tensor.shape[axis] for axis in axes if axis != own}
    return [axis for axis, size in sizes.items() if size == tensor.numel()]


def _rows(site: Site, gradient: Tensor, layouts: Layouts, axis: int) -> Tensor:
    """A site's output gradient as [N, T, features]."""
    layout = layouts.sites[site.target]
    return layout.rows(gradient, axis) if type(site.module) is Tap else SiteRows(site.module, layout).outputs(gradient)


class PositionwiseCollector(Collector):
    """`Collector` with the positions of every example as examples of their own; calls of a weight stay positions."""

    def __init__(self, spec: LayerSpec, layouts: Layouts, form: Form | None, factors: bool, per_draw: bool) -> None:
        super().__init__(spec, layouts, form, factors, per_draw)
        assert layouts.independent is not None
        self.count_positions = layouts.independent.positions
        self.examples = layouts.examples * self.count_positions
        self._apart: Tensor | None = None

    def _each(self, rows: Tensor) -> Tensor:
        """[N, calls T, d] -> [N T, calls, d]."""
        split = rows.unflatten(1, (-1, self.count_positions))
        return split.transpose(1, 2).flatten(0, 1)

    def _a(self) -> Tensor:
        if self._apart is None:
            self._apart = self._each(super()._a())
        return self._apart

    def _g(self) -> Tensor:
        return self._each(super()._g())

    def result(self, masks: Mapping[str, Tensor]) -> Extract:
        """As for ordinary columns: A of reduce takes the mean over an example's positions."""
        found = super().result({})
        a, real = Collector._a(self), self._real(masks)
        examples, positions = a.shape[:2]
        kept = a.new_ones(examples, positions) if real is None else real.to(a.dtype)
        masked, counts = a * kept.unsqueeze(-1), kept.sum(1)
        factors = {}
        if found.factors:
            bias = self.spec.bias is not None
            A_expand = input_gram(masked.flatten(0, 1), float(counts.sum()), bias=bias)
            A_reduce = input_gram(masked.sum(1) / counts.unsqueeze(1), float(examples), bias=bias)
            factors = {
                "expand": (A_expand, found.factors["expand"][1]),
                "reduce": (A_reduce, found.factors["reduce"][1]),
            }
        rows = RowCounts.of(counts, torch.full_like(counts, positions), positions)
        return dataclasses.replace(
            found,
            examples=examples,
            positions=rows.positions,
            padded=rows.padded,
            counts=rows,
            factors=factors,
            mean_input=masked.sum((0, 1), dtype=torch.float64) / float(counts.sum()) if found.factors else None,
            real=real,
        )


class PositionwiseTapCollector(TapCollector):
    """`TapCollector` with a column for every position: [N T, P]."""

    def __init__(self, spec: LayerSpec, layouts: Layouts, form: Form | None, factors: bool, per_draw: bool) -> None:
        super().__init__(spec, layouts, form, factors, per_draw)
        assert layouts.independent is not None
        self.axes = layouts.independent.tap_axes
        self.examples = layouts.examples * layouts.independent.positions

    def receive(self, target: str, gradient: Tensor) -> None:
        """One tap's output gradient of this pass."""
        tap, layout, axis = self.taps[target], self.layouts[target], self.axes[target]
        assert isinstance(tap, Tap)
        starts = dict(zip(self.spec.members, accumulate(self.spec.members.values(), initial=0), strict=False))
        if self.sum is None:
            self.sum = gradient.new_zeros(self.examples, self.spec.parameters)
        for name, product, places in tap_entries(tap, gradient, self.extra[target]):
            rows = layout.rows(product, axis).flatten(0, 1)
            where = layout.rows(places.expand(product.shape), axis).flatten(0, 1)
            if name in self.pulls:
                size = tap.shapes[name].numel()
                known = self.values.setdefault(name, gradient.new_zeros(self.examples, size))
                known.scatter_add_(1, where, rows)
            else:
                self.sum.scatter_add_(1, where + starts[name], rows)

    def result(self, masks: Mapping[str, Tensor]) -> Extract:
        """The exact columns; there are no factors."""
        return dataclasses.replace(super().result(masks), examples=self.whole_examples)


def shared_note(apart: Independent) -> str:
    """Says in words that passes were shared."""
    return (
        f"The model does not mix the {apart.positions} positions of an example (checked on this batch), so one "
        f"backward pass serves all of them: {apart.columns} passes instead of {apart.positions * apart.columns}."
    )
