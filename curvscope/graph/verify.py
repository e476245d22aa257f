"""Which rows of a site belong to which example: established by permuting the examples, never assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from curvscope.errors import LayoutError
from curvscope.graph.functional import Graph
from curvscope.graph.isolation import MIXED_EXAMPLES, check_isolated, looped
from curvscope.graph.layout import Layout, candidates, holds
from curvscope.graph.passing import observe, watched_pass
from curvscope.graph.ragged import Ragged
from curvscope.graph.routing import Routing
from curvscope.graph.sites import Site, spatial_dims
from curvscope.graph.tap import Tap


@dataclass(frozen=True)
class Independent:
    """Positions (tokens, pixels) that no layer mixes on the way to the outputs.

    Attributes:
        axis: the axis of the outputs along which one position's numbers lie.
        positions: T, how many an example has.
        columns: those of one position.
        tap_axes: tap -> the axis of its output along which one position's numbers lie.
    """

    axis: int
    positions: int
    columns: int
    tap_axes: dict[str, int]


@dataclass(frozen=True)
class Layouts:
    """What `verify` established.

    Attributes:
        examples: N.
        output: the layout of the model's output.
        sites: site target -> layout of its rows (of axis 0 for convolutions).
        outputs: the model's output on the batch, detached.
        positions: site target -> rows an example, R of that call (of the longest example where they differ).
        independent: how positions are kept apart, where they do not mix and exact columns gain by it.
        tokens: layer -> the rows of its embedding that the batch looks up [U], ascending, without `padding_idx`.
        routed: whether some rows belong to examples as the values of this batch say, so that another batch or a part of
            it has other layouts.
    """

    examples: int
    output: Layout
    sites: dict[str, Layout]
    outputs: Tensor
    positions: dict[str, int]
    independent: Independent | None = None
    tokens: dict[str, Tensor] = field(default_factory=dict)
    routed: bool = False


def verify(graph: Graph, tensors: Sequence[Tensor], axes: Sequence[int | None], examples: int) -> Layouts:
    """Layouts of the output and of all sites' rows.

    Candidates are the axes whose size N divides. One holds if permuting the examples permutes the rows
    accordingly, up to rounding, and if no example's output depends on another example's rows; of several that hold the
    closest match is taken, the plainest where they are equal. Where none does, disturbing the examples tells the rows
    (see `curvscope.graph.routing`). A layer whose rows are told by nothing is given up, with the reason. At last some
    examples are replaced, and the others have to stay as they were (`check_isolated`).

    Raises:
        LayoutError: no candidate holds for the output, or for no layer at all; or the model mixes examples.
        ModelError: NaN or Inf appears along the way; the first layer is named.
    """
    output, inputs, rows, tokens = observe(graph, tensors)
    if examples == 1:
        found = {target: _whole(tensor) for target, tensor in inputs.items()}
        positions = _positions(rows, inputs, found, 1)
        return Layouts(1, _whole(output), found, output, positions, tokens=tokens, routed=bool(graph.routes))
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(examples, generator=generator)
    if bool((order == torch.arange(examples)).all()):
        order = order.roll(1)
    order = order.to(output.device)
    permuted = [
        tensor if axis is None else tensor.index_select(axis, order) for tensor, axis in zip(tensors, axes, strict=True)
    ]
    output_permuted, inputs_permuted, *_ = observe(graph, permuted)
    tolerance = float(torch.finfo(output.dtype).eps) ** 0.5
    passing: dict[str, list[Layout]] = {}
    refusals: dict[str, LayoutError] = {}
    allowed = {site.target: _row_axes(site, inputs[site.target]) for site in graph.sites()}
    for site in graph.sites():
        pair = inputs[site.target], inputs_permuted[site.target]
        try:
            passing[site.target] = _holding(
                *pair, order, examples, allowed[site.target], tolerance, f"layer {site.layer}"
            )
        except LayoutError as refusal:
            passing[site.target] = []
            calls = len(graph.layers[site.layer].sites)
            once_each = calls % examples == 0 and rows[site.target] < examples
            refusals[site.target] = looped(site.layer) if once_each else refusal
    try:
        layout = _holding(output, output_permuted, order, examples, output.ndim, tolerance, "the model's output")[0]
    except LayoutError as refusal:
        # the first layer that does not follow, either, says more
        raise next(iter(refusals.values()), refusal) from None
    strangers = _Strangers(graph, tensors, layout, tolerance / 100)
    found = {target: kept for target, choices in passing.items() if (kept := strangers.first(target, choices))}
    open_sites = {target: allowed[target] for target in passing if target not in found}
    by_values: dict[str, Layout] = {}
    if open_sites:
        told = Routing(graph, tensors, axes, examples, layout, found, open_sites).layouts()
        by_values = {target: each for target, each in told.items() if strangers.first(target, [each])}
    for site in graph.sites():
        if site.target in open_sites and site.target not in by_values:
            _give_up(graph, site, refusals.get(site.target), bool(found))
    found |= by_values
    left = {site.target for site in graph.sites()}
    found = {target: each for target, each in found.items() if target in left}
    routed = any(target in found for target in by_values) or _routes(graph, tensors, axes, rows)
    del output_permuted, inputs_permuted
    sites = {target: (each, inputs[target]) for target, each in found.items()}
    check_isolated(graph, tensors, axes, (layout, output), sites)
    positions = _positions(rows, inputs, found, examples)
    return Layouts(examples, layout, found, output, positions, tokens=tokens, routed=routed)


def _routes(graph: Graph, tensors: Sequence[Tensor], axes: Sequence[int | None], rows: Mapping[str, int]) -> bool:
    """Whether values decide how many rows a site has: copies of the first example then have other ones."""
    if graph.routes is not None:
        return graph.routes
    copies = [
        tensor if axis is None else tensor.narrow(axis, 0, 1).expand_as(tensor)
        for tensor, axis in zip(tensors, axes, strict=True)
    ]
    return observe(graph, copies)[2] != rows


def _row_axes(site: Site, rows: Tensor) -> int:
    """How many leading axes of a site's input (of an embedding's output) may hold its rows."""
    if isinstance(site.module, Tap):
        return rows.ndim
    return 1 if spatial_dims(site.kind) else rows.ndim - 1


def _give_up(graph: Graph, site: Site, refusal: LayoutError | None, others: bool) -> None:
    """Leave a layer out whose rows have no layout; it counts as uncovered.

    Raises:
        LayoutError: the model mixes examples behind it, or no layer has a layout.
    """
    if refusal is None:
        raise LayoutError(
            "The model mixes examples: the outputs of some depend on the rows of others, so its loss has no "
            "curvature for each example alone.",
            where=f"behind layer {site.layer}",
            remedy=MIXED_EXAMPLES,
        )
    if isinstance(site.module, Tap):
        why = "what it is combined with belongs to no example; its exact block is not computed"
    elif isinstance(site.module, nn.Embedding):
        why = "the rows looked up in it belong to no example; its exact block is not computed"
    elif others:
        why = "its rows can't be assigned to examples, neither by permuting these nor by disturbing them"
    else:
        raise refusal
    if site.layer in graph.layers:
        graph.drop(site.layer, why)


class _Strangers:
    """Gradients of every other example's outputs, which must vanish on the rows of the examples between.

    Permutations can't tell this: batch statistics or attention over the batch commute with them.
    """

    def __init__(self, graph: Graph, tensors: Sequence[Tensor], output_layout: Layout, tolerance: float) -> None:
        with watched_pass(graph, tensors) as (output, watched), torch.enable_grad():
            generator = torch.Generator().manual_seed(1)
            cotangent = torch.randn(output.shape, generator=generator).to(output)
            examples = output_layout.flat(cotangent).clone()
            examples[1::2] = 0
            cotangent = output_layout.unflat(examples, cotangent)
            grads = torch.autograd.grad(output, list(watched.values()), cotangent, allow_unused=True)
        self.gradients = dict(zip(watched, grads, strict=True))
        self.tolerance = tolerance

    def first(self, target: str, choices: Sequence[Layout]) -> Layout | None:
        """The first of a site's candidates under which no example's output depends on another example's rows."""
        gradient = self.gradients.get(target)
        size = 0.0 if gradient is None or not gradient.numel() else float(gradient.abs().max())
        for layout in choices:
            if gradient is None or size == 0.0:
                return layout
            if float(layout.split(gradient)[1::2].abs().max()) <= self.tolerance * size:
                return layout
        return None


def _positions(
    rows: Mapping[str, int], inputs: Mapping[str, Tensor], layouts: Mapping[str, Layout], examples: int
) -> dict[str, int]:
    """Rows an example at every site; those of the longest where they differ."""
    found = {}
    for target, layout in layouts.items():
        size = inputs[target].shape[layout.axis] if inputs[target].ndim else 1
        ragged = isinstance(layout, Ragged)
        found[target] = rows[target] * layout.inner // max(1, size) if ragged else rows[target] // examples
    return found


def _whole(tensor: Tensor) -> Layout:
    """The layout of one example: every row is its own, if there are any."""
    if tensor.ndim and tensor.shape[0] == 0:
        return Ragged.of(0, torch.zeros(0, dtype=torch.long, device=tensor.device), 1)
    return Layout(0, 1, tensor.shape[0] if tensor.ndim else 1)


def _holding(
    original: Tensor,
    permuted: Tensor,
    order: Tensor,
    examples: int,
    allowed_axes: int,
    tolerance: float,
    where: str,
) -> list[Layout]:
    """The candidates that hold, the closest first, the plainest of equally close ones first."""
    factors = {
        axis: original.shape[axis] // examples
        for axis in range(allowed_axes)
        if original.shape[axis] % examples == 0 and original.shape[axis] > 0
    }
    tried = [(holds(layout, original, permuted, order), i, layout) for i, layout in enumerate(candidates(factors))]
    # Equal to rounding counts as equal: the plainest candidate then wins.
    passing = [(gap if gap > tolerance**2 else 0.0, i, layout) for gap, i, layout in tried if gap <= tolerance]
    if passing:
        return [layout for _, _, layout in sorted(passing)]
    closest = f"; the closest candidate is off by {min(tried)[0]:.2g}" if tried else ""
    raise LayoutError(
        f"Its rows can't be assigned to examples: shape {list(original.shape)}, {examples} examples, and no axis "
        f"follows when the examples are permuted{closest}.",
        where=where,
        remedy="Say which axis of each input holds the examples (--example-axis NAME=AXIS). A layer that mixes "
        "examples (attention over the batch, batch statistics) has no per-example rows: leave it out with --skip.",
    )
