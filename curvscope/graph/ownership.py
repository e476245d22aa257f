"""Which rows of a site belong to which graph of a batch: proposed by the inputs, decided by gradients.

Permuting graphs means renumbering nodes wherever the inputs speak of them, which only the model could tell. So a
candidate is tested by isolation instead: the outputs of some graphs must have no gradient on the rows of the others.
With the graphs' numbers in binary, two backward passes a digit test every pair of graphs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from curvscope.errors import LayoutError
from curvscope.graph.functional import Graph
from curvscope.graph.isolation import MIXED_GRAPHS, check_graphs_isolated
from curvscope.graph.layout import Layout
from curvscope.graph.passing import observe, watched_pass
from curvscope.graph.ragged import Ragged
from curvscope.graph.sites import Site, spatial_dims
from curvscope.graph.tap import Tap
from curvscope.graph.verify import Layouts


def verify_graphs(graph: Graph, tensors: Sequence[Tensor], rows: Sequence[Tensor]) -> Layouts:
    """Layouts of the output and of all sites' rows in a batch of graphs.

    `rows` are the candidates (`graph_inputs.owners`, that of the graphs first). Where none of them holds, as behind
    pooling that keeps some nodes, the rows' graphs are read off the gradients, if these reach every row.

    Raises:
        LayoutError: no candidate holds for the output, or for some layer, and gradients do not tell either; or the
            model mixes graphs.
        ModelError: NaN or Inf appears along the way; the first layer is named.
    """
    examples = len(rows[0])
    output, inputs, counts, tokens = observe(graph, tensors)
    outputs = list(_candidates(output, rows, range(output.ndim)))
    if not outputs:
        raise LayoutError(
            f"The outputs {list(output.shape)} can't be assigned to the {examples} graphs.",
            where="the model's output",
            remedy="Return one row a graph, a node or an edge, in the order of the inputs.",
        )
    refusals: list[LayoutError] = []
    for layout in outputs:
        try:
            found, lost = _sites(graph, tensors, layout, rows, inputs)
        except LayoutError as error:
            refusals.append(error)
            continue
        for layer in dict.fromkeys(lost):
            graph.drop(layer, "what it is combined with belongs to no example; its exact block is not computed")
        positions = {
            target: counts[target] * kept.inner // inputs[target].shape[kept.axis]
            if isinstance(kept, Ragged)
            else counts[target] // examples
            for target, kept in found.items()
        }
        sites = {target: (kept, inputs[target]) for target, kept in found.items()}
        check_graphs_isolated(graph, tensors, rows, (layout, output), sites)
        return Layouts(examples, layout, found, output, positions, tokens=tokens)
    raise refusals[0]


def _sites(
    graph: Graph, tensors: Sequence[Tensor], output_layout: Layout, rows: Sequence[Tensor], inputs: dict[str, Tensor]
) -> tuple[dict[str, Layout], list[str]]:
    """The layout of every site, and the exact-only layers and embeddings that have none."""
    examples = len(rows[0])
    tests = {site.target: _Test(site, inputs[site.target], rows) for site in graph.sites()}
    with watched_pass(graph, tensors) as (output, watched), torch.enable_grad():
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(output.shape, generator=generator).to(output)
        for chosen in _halves(examples, output.device):
            cotangent = output_layout.flat(noise) * chosen.unsqueeze(1).to(noise)
            grads = torch.autograd.grad(
                output,
                list(watched.values()),
                output_layout.unflat(cotangent, noise),
                allow_unused=True,
                retain_graph=True,
            )
            for target, gradient in zip(watched, grads, strict=True):
                if target in tests and gradient is not None:
                    tests[target].add(gradient, chosen)
    tolerance = float(torch.finfo(output.dtype).eps) ** 0.5 / 100
    found: dict[str, Layout] = {}
    lost: list[str] = []
    for site in graph.sites():
        layout = tests[site.target].result(tolerance)
        if layout is not None:
            found[site.target] = layout
        elif isinstance(site.module, (Tap, nn.Embedding)):
            lost.append(site.layer)
        else:
            raise tests[site.target].refusal(tolerance)
    return {target: layout for target, layout in found.items() if tests[target].site.layer not in lost}, lost


class _Test:
    """One site's candidates while the passes run: how far gradients reach into rows of the other graphs."""

    def __init__(self, site: Site, tensor: Tensor, rows: Sequence[Tensor]) -> None:
        self.site = site
        self.shape = list(tensor.shape)
        self.examples = len(rows[0])
        allowed = tensor.ndim - (not isinstance(site.module, Tap))
        if not isinstance(site.module, Tap) and spatial_dims(site.kind):
            allowed = 1
        self.axes = range(allowed)
        self.candidates = list(_candidates(tensor, rows, self.axes))
        self.size = 0.0
        self.strays = [0.0] * len(self.candidates)
        # nothing is reached before a pass says so
        nothing = [torch.zeros(tensor.shape[axis], device=tensor.device) for axis in self.axes]
        self.reached = {axis: [none, none] for axis, none in zip(self.axes, nothing, strict=True)}
        self.passes = 0

    def add(self, gradient: Tensor, chosen: Tensor) -> None:
        """The gradient that the outputs of the chosen graphs have here."""
        self.size = max(self.size, float(gradient.abs().max()) if gradient.numel() else 0.0)
        for number, layout in enumerate(self.candidates):
            strangers = layout.split(gradient)[~chosen]
            if strangers.numel():
                self.strays[number] = max(self.strays[number], float(strangers.abs().max()))
        for axis in self.axes:
            if not self.passes:
                self.reached[axis] = []
            others = tuple(other for other in range(gradient.ndim) if other != axis)
            self.reached[axis].append(gradient.abs().amax(others) if others else gradient.abs())
        self.passes += 1

    def result(self, tolerance: float) -> Layout | None:
        """The first candidate that holds, or what the gradients say."""
        for layout, stray in zip(self.candidates, self.strays, strict=True):
            if stray <= tolerance * self.size:
                return layout
        for axis in self.axes:
            zeros, ones = self._sides(axis, tolerance)
            if bool((zeros ^ ones).all()):
                digits = 2 ** torch.arange(len(ones), device=ones.device)
                return Ragged.of(axis, (ones * digits.unsqueeze(1)).sum(0), self.examples)
        return None

    def _sides(self, axis: int, tolerance: float) -> tuple[Tensor, Tensor]:
        """[digits, rows]: whether the outputs of graphs with a 0 there reach the row, and of those with a 1."""
        reached = torch.stack(self.reached[axis]) > tolerance * self.size
        return reached[0::2], reached[1::2]

    def refusal(self, tolerance: float) -> LayoutError:
        """Why there is no layout, in words."""
        if all(bool(torch.logical_and(*self._sides(axis, tolerance)).any()) for axis in self.axes):
            return LayoutError(
                "The model mixes graphs: the outputs of some depend on the rows of others, so its loss has no "
                "curvature for each graph alone.",
                where=f"behind layer {self.site.layer}",
                remedy=MIXED_GRAPHS,
            )
        return LayoutError(
            f"Its rows can't be assigned to graphs: shape {self.shape}, {self.examples} graphs; they are neither "
            "nodes nor edges in the order of the inputs, and no output depends on some of them.",
            where=f"layer {self.site.layer}",
            remedy="Take the whole batch as one example, without --example-index, or leave the layer out with --skip.",
        )


def _halves(examples: int, device: torch.device) -> Iterator[Tensor]:
    """For every binary digit of the graphs' numbers: those that have 0 there, then those that have 1."""
    numbers = torch.arange(examples, device=device)
    for digit in range(max(1, (examples - 1).bit_length())):
        one = (numbers >> digit) % 2 == 1
        yield ~one
        yield one


def _candidates(tensor: Tensor, rows: Sequence[Tensor], axes: range) -> Iterator[Layout]:
    """The layouts that the sizes allow: rows as they are, then several for each side by side, then repeated."""
    for several in (False, True):
        for axis in axes:
            size = tensor.shape[axis]
            for number, owner in enumerate(rows):
                times, rest = divmod(size, len(owner))
                if rest or times < 1 or (times > 1) != several:
                    continue
                if number == 0:
                    yield from [Layout(axis, 1, times), Layout(axis, times, 1)] if several else [Layout(axis)]
                elif several:
                    yield Ragged.of(axis, owner.repeat_interleave(times), len(rows[0]))
                    yield Ragged.of(axis, owner.repeat(times), len(rows[0]))
                else:
                    yield Ragged.of(axis, owner, len(rows[0]))
