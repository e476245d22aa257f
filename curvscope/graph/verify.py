"""Which rows of a site belong to which example: established by permuting the examples, never assumed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from curvscope.errors import LayoutError, ModelError
from curvscope.graph.functional import Graph
from curvscope.graph.isolation import MIXED_EXAMPLES, check_isolated, looped
from curvscope.graph.layout import Layout, candidates, holds
from curvscope.graph.sites import SiteModule, spatial_dims
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
    """

    examples: int
    output: Layout
    sites: dict[str, Layout]
    outputs: Tensor
    positions: dict[str, int]
    independent: Independent | None = None
    tokens: dict[str, Tensor] = field(default_factory=dict)


def verify(graph: Graph, tensors: Sequence[Tensor], axes: Sequence[int | None], examples: int) -> Layouts:
    """Layouts of the output and of all sites' rows.

    Candidates are the axes whose size N divides. One holds if permuting the examples permutes the rows
    accordingly, up to rounding, and if no example's output depends on another example's rows; of several that hold the
    closest match is taken, the plainest where they are equal. At last some examples are replaced (`check_isolated`).

    Raises:
        LayoutError: no candidate holds for some layer, or for the output; or the model mixes examples.
        ModelError: NaN or Inf appears along the way; the first layer is named.
    """
    output, inputs, rows, tokens = observe(graph, tensors)
    if examples == 1:
        return Layouts(
            1,
            _whole(output),
            {target: _whole(tensor) for target, tensor in inputs.items()},
            output,
            _positions(rows, 1),
            tokens=tokens,
        )
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
    lost: dict[str, str] = {}
    for site in graph.sites():
        is_tap = isinstance(site.module, Tap)
        allowed = inputs[site.target].ndim - (not is_tap)
        if not is_tap and spatial_dims(site.kind):
            allowed = 1
        pair = inputs[site.target], inputs_permuted[site.target]
        try:
            passing[site.target] = _holding(*pair, order, examples, allowed, tolerance, f"layer {site.layer}")
        except LayoutError as refusal:
            calls = len(graph.layers[site.layer].sites)
            once_each = calls % examples == 0 and rows[site.target] < examples
            refusals[site.layer] = looped(site.layer) if once_each else refusal
            what = "what it is combined with belongs" if is_tap else "its rows belong"
            what = "the rows looked up in it belong" if isinstance(site.module, nn.Embedding) else what
            lost[site.layer] = f"{what} to no example; its exact block is not computed"
    if not passing and refusals:
        raise next(iter(refusals.values()))
    for layer, why in lost.items():
        graph.drop(layer, why)
    if refusals and not graph.chosen():
        raise next(iter(refusals.values()))
    layout = _holding(output, output_permuted, order, examples, output.ndim, tolerance, "the model's output")[0]
    del output_permuted, inputs_permuted
    found = _settled(graph, tensors, layout, passing, tolerance / 100)
    sites = {target: (kept, inputs[target]) for target, kept in found.items()}
    check_isolated(graph, tensors, axes, (layout, output), sites)
    return Layouts(examples, layout, found, output, _positions(rows, examples), tokens=tokens)


def _settled(
    graph: Graph, tensors: Sequence[Tensor], output_layout: Layout, passing: dict[str, list[Layout]], tolerance: float
) -> dict[str, Layout]:
    """Of every site's candidates the first under which no example's output depends on another example's rows.

    Permutations can't tell this: batch statistics or attention over the batch commute with them. Gradients can: those
    of every other example's outputs must vanish on the rows of the examples between.

    Raises:
        LayoutError: some site has no such candidate, so the model mixes examples behind it.
    """
    with watched_pass(graph, tensors) as (output, watched), torch.enable_grad():
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(output.shape, generator=generator).to(output)
        examples = output_layout.flat(cotangent).clone()
        examples[1::2] = 0
        cotangent = output_layout.unflat(examples, cotangent)
        grads = torch.autograd.grad(output, list(watched.values()), cotangent, allow_unused=True)
    gradients = dict(zip(watched, grads, strict=True))
    found = {}
    for site in graph.sites():
        gradient = gradients.get(site.target)
        size = 0.0 if gradient is None else float(gradient.abs().max())
        choices = passing[site.target]
        if gradient is not None and size > 0:
            choices = [
                layout for layout in choices if float(layout.split(gradient)[1::2].abs().max()) <= tolerance * size
            ]
        if not choices:
            raise LayoutError(
                "The model mixes examples: the outputs of some depend on the rows of others, so its loss has no "
                "curvature for each example alone.",
                where=f"behind layer {site.layer}",
                remedy=MIXED_EXAMPLES,
            )
        found[site.target] = choices[0]
    return found


@contextlib.contextmanager
def watched_pass(graph: Graph, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """A forward pass with gradients: its output, and every site's output that a gradient can reach."""
    kept: dict[str, Tensor] = {}
    handles = []

    def keeper(target: str) -> Any:
        def keep(module: Any, args: Any, result: Tensor) -> None:
            kept[target] = result

        return keep

    try:
        for site in graph.sites():
            handles.append(site.module.register_forward_hook(keeper(site.target)))
        with torch.enable_grad():
            output = graph.run(*tensors)
            kept |= graph.leaves()
        yield output, {target: tensor for target, tensor in kept.items() if tensor.requires_grad}
    finally:
        for handle in handles:
            handle.remove()


def _positions(rows: dict[str, int], examples: int) -> dict[str, int]:
    return {target: count // examples for target, count in rows.items()}


def _whole(tensor: Tensor) -> Layout:
    """The layout of one example: every row is its own."""
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


def observe(
    graph: Graph, tensors: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Tensor], dict[str, int], dict[str, Tensor]]:
    """The output of one forward pass without gradients, every site's input, its number of rows, and `Layouts.tokens`.

    An embedding's input is an index, whose axes are those of its output: the output stands in for it.
    """
    inputs: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    tokens: dict[str, Tensor] = {}
    bad: list[tuple[str, str, str]] = []
    handles = []

    def watcher(target: str, layer: str, kind: str) -> object:
        def watch(module: SiteModule, args: tuple[Tensor, ...], result: Tensor) -> None:
            inputs[target] = args[0].detach()
            rows[target] = 0 if isinstance(module, Tap) else result.numel() // result.shape[1 if "conv" in kind else -1]
            if isinstance(module, nn.Embedding):
                inputs[target] = result.detach()
                tokens[layer] = _joined(tokens.get(layer), args[0], module.padding_idx)
            if not bad:
                for what, tensor in (("input", args[0]), ("output", result)):
                    if not bool(torch.isfinite(tensor).all()):
                        word = "NaN" if bool(torch.isnan(tensor).any()) else "Inf"
                        bad.append((layer, what, word))
                        break

        return watch

    try:
        for site in graph.sites():
            handles.append(site.module.register_forward_hook(watcher(site.target, site.layer, site.kind)))
        with torch.no_grad():
            output = graph.run(*tensors).detach()
    finally:
        for handle in handles:
            handle.remove()
    if bad:
        layer, what, kind = bad[0]
        raise ModelError(
            f"{kind} appears in the forward pass: first in the {what} of layer {layer}.",
            where=f"layer {layer}, {what}",
            remedy="The weights and the batch are finite, so the pass itself overflows there: look at the layers just "
            "before it, or analyze with --dtype float64 to tell overflow from divergence.",
        )
    if not bool(torch.isfinite(output).all()):
        raise ModelError(
            "The model's output is not finite.",
            where="the forward pass, after the last linear layer",
            remedy="Look at the operations behind the last layer, or analyze with --dtype float64.",
        )
    return output, inputs, rows, tokens


def looked_up(graph: Graph, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """`Layouts.tokens` of some inputs alone, by one forward pass; nothing where there are no embeddings."""
    if not any(isinstance(site.module, nn.Embedding) for site in graph.sites()):
        return {}
    return observe(graph, tensors)[3]


def all_tokens(known: dict[str, Tensor], more: dict[str, Tensor], graph: Graph) -> dict[str, Tensor]:
    """The tokens of both, by layer."""
    padding = {site.layer: site.module.padding_idx for site in graph.sites() if isinstance(site.module, nn.Embedding)}
    return more | {
        layer: _joined(tokens, more.get(layer, tokens), padding.get(layer)) for layer, tokens in known.items()
    }


def _joined(known: Tensor | None, index: Tensor, padding: int | None) -> Tensor:
    """The tokens known so far with those of one more look-up; padding alone where there is nothing else."""
    parts = [index.detach().flatten().long()]
    if known is not None:
        parts.append(known)
    joined = torch.cat(parts).unique()
    return joined if padding is None or joined.numel() == 1 else joined[joined != padding]
