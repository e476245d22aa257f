"""One sweep: a forward pass, one backward pass for the gradient and one a column, all with respect to activations.

Out come A and B of both flavours, the gradient and the GGN columns of every layer (conventions: records.CONVENTIONS).
Passes are looped over columns on one retained graph, so memory holds one pass's gradients at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvscope.extract.collector import Collector, Extract, Form
from curvscope.extract.embedding import EmbeddingCollector
from curvscope.extract.extension import SiteExtension, active, extended
from curvscope.extract.grouped import GroupedCollector
from curvscope.extract.padding import Judge, Padding
from curvscope.extract.plan import site_positions
from curvscope.extract.positionwise import PositionwiseCollector, PositionwiseTapCollector
from curvscope.extract.projected import ProjectedCollector
from curvscope.extract.roots import Root
from curvscope.extract.symmetric import BlockSum
from curvscope.extract.taps import TapCollector
from curvscope.extract.tied import TiedCollector
from curvscope.graph.functional import Graph
from curvscope.graph.sites import LayerSpec
from curvscope.graph.verify import Layouts

Progress = Callable[[str, str, int, int], None]


def no_progress(stage: str, item: str, done: int, total: int) -> None:
    """Report to nobody."""


def sweep(
    graph: Graph,
    tensors: Sequence[Tensor],
    layouts: Layouts,
    root: Root | Callable[[Tensor], Root],
    forms: Mapping[str, Form | None],
    *,
    factors: bool = True,
    per_draw: Collection[str] = (),
    gradient_only: Sequence[str] = (),
    progress: Progress = no_progress,
    judge: Judge | None = None,
    blocks: dict[str, BlockSum] | None = None,
    formed_draws: int = 0,
    projected: Mapping[str, ProjectedCollector] | None = None,
    rows: Collection[str] = (),
) -> dict[str, Extract]:
    """Factors, gradient and columns of the layers named in `forms`, in one sweep.

    Args:
        graph: the functional graph.
        tensors: the batch, flat.
        layouts: the verified layouts of the sites' rows.
        root: columns and gradient to backpropagate, or what makes them from the (detached) output.
        forms: layer -> the form its columns are kept in, None for no columns.
        factors: also accumulate A, B and the gradient.
        per_draw: layers of which B of each draw alone is kept, too (for error bars).
        gradient_only: further layers of which only the gradient is wanted.
        progress: called after every backward pass.
        judge: given where the batch is a piece of the data; it learns what looks like padding here.
        projected: collectors of layers that are to be squared in given bases, instead of those of `forms`.
        rows: layers that keep their rows beside columns of another form, see `layers_with_rows`.
        blocks: sums that formed columns are added to, and where those that are begun here are put.
        formed_draws: how many draws there are, where columns that are formed are summed for each draw; else 0.
    """
    wanted: dict[str, Form | None] = {**forms, **dict.fromkeys(gradient_only)}
    collectors: dict[str, Collector | TapCollector | TiedCollector] = {}
    padding = Padding(graph, layouts, piece=judge is not None) if factors else None
    owners = {id(site.module): (site.target, site.layer) for site in graph.sites()}
    watched = [
        site.module
        for site in graph.sites()
        if site.layer in wanted or site.layer in (projected or {}) or padding is not None
    ]

    def receive(module: nn.Module, tensor: Tensor, gradient: Tensor) -> None:
        target, layer = owners[id(module)]
        if layer in collectors:
            collectors[layer].receive(target, gradient)
        if padding is not None:
            padding.receive(target, gradient)

    extension = SiteExtension(receive)
    # Any: BackPACK hangs the input on the module
    modules: dict[str, Any] = {site.target: site.module for site in graph.sites()}
    with extended(watched), torch.enable_grad():
        output = graph.run(*tensors)
        leaves = graph.leaves()
        taken: Root = root if isinstance(root, Root) else root(output.detach())
        for name, form in wanted.items():
            spec, listed = graph.layers[name], name in forms
            kind = _collector(spec, taken)
            made = collectors[name] = kind(spec, layouts, form, factors and listed, listed and name in per_draw)
            made.block = (blocks or {}).get(name)
            made.formed_draws = formed_draws
            made.undecided = judge is not None
        collectors |= projected or {}
        for collector in collectors.values():
            collector.begin(modules, taken.columns)
        for name in rows:
            own = collectors[name]
            assert isinstance(own, Collector)
            own.keeps_rows = True
        with active(extension):
            passes = ([taken.gradient] if factors else []) + [None] * taken.columns
            for index, given in enumerate(passes):
                cotangent = taken.column(index - int(factors)) if given is None else given
                for collector in collectors.values():
                    collector.start(None if given is not None else index - int(factors))
                if padding is not None:
                    padding.start(cotangent, counts=given is None)
                ends = torch.autograd.grad(
                    output,
                    list(leaves.values()),
                    cotangent,
                    retain_graph=index + 1 < len(passes),
                    allow_unused=True,
                )
                for (target, leaf), end in zip(leaves.items(), ends, strict=True):
                    if not hasattr(modules.get(target), "input0"):
                        continue  # a root whose layer this sweep does not watch, or that was given up
                    extension(modules[target], (None,), (torch.zeros_like(leaf) if end is None else end,))
                for name, collector in collectors.items():
                    if given is not None or name in forms or name in (projected or {}):
                        collector.finish()
                progress("backward passes", f"column {index + 1} of {len(passes)}", index + 1, len(passes))
        masks = padding.masks(tensors, output, judge) if padding is not None else {}
        if blocks is not None:
            blocks |= {name: each.block for name, each in collectors.items() if each.block is not None}
        return {
            name: dataclasses.replace(collector.result(masks), unit=taken.unit, draw_moments=taken.draw_moments)
            for name, collector in collectors.items()
        }


def layers_with_rows(
    layers: Mapping[str, LayerSpec],
    forms: Mapping[str, Form | None],
    positions: Mapping[str, int],
    *,
    examples: int,
    columns: int,
    itemsize: int,
    limit: int,
) -> list[str]:
    """The layers that keep their rows beside dense or formed columns: those with the smallest, together under `limit`.

    Only layers whose rows are those of one matrix: not groups, nor parameters without a Kronecker form. The rows are
    those of all `examples`, with K `columns` each, so the choice does not depend on how the data is cut.
    """
    sizes = {}
    for name, form in forms.items():
        spec = layers[name]
        if form in ("dense", "formed") and _one_matrix(spec):
            rows = examples * site_positions(positions, [site.target for site in spec.sites])
            sizes[name] = itemsize * rows * (spec.d_in + columns * spec.d_out)
    kept, chosen = 0, []
    for name in sorted(sizes, key=lambda name: sizes[name]):
        kept += sizes[name]
        if kept <= limit:
            chosen.append(name)
    return chosen


def _one_matrix(spec: LayerSpec) -> bool:
    return not (spec.exact_only or spec.roles or spec.kind == "embedding" or spec.groups > 1)


def _collector(spec: LayerSpec, root: Root) -> type[Collector] | type[TapCollector] | type[TiedCollector]:
    """What collects a layer's columns."""
    if root.shared:
        return PositionwiseTapCollector if spec.exact_only else PositionwiseCollector
    if spec.exact_only:
        return TapCollector
    if spec.roles:
        return TiedCollector
    if spec.kind == "embedding":
        return EmbeddingCollector
    return Collector if spec.groups == 1 else GroupedCollector
