"""Whether examples reach each other anywhere, in front of the first layer, too.

Permuting examples can't tell (their mean does not change), and gradients tell only what lies behind a layer. So half of
the examples are replaced by copies of another one, which any kind of input allows: what the other half has must stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvscope.errors import LayoutError
from curvscope.graph.functional import Graph
from curvscope.graph.layout import Layout
from curvscope.graph.ragged import Ragged

# Parts of sqrt(eps) of the largest entry that what stays may differ by: routed rows are multiplied in other shapes.
ROUNDING = 0.1


def check_isolated(
    graph: Graph,
    tensors: Sequence[Tensor],
    axes: Sequence[int | None],
    output: tuple[Layout, Tensor],
    sites: Mapping[str, tuple[Layout, Tensor]],
) -> None:
    """Refuse a model in which some examples' outputs or rows change when others are replaced by copies of the first.

    Args:
        graph: the model.
        tensors: the batch, of at least two examples.
        axes: the example axis of every input.
        output: the layout of the model's output, and the output.
        sites: site -> the same of its rows (its input, of an embedding its output).

    Raises:
        LayoutError: some change; the first layer whose rows do is named.
    """
    replaced = []
    for tensor, axis in zip(tensors, axes, strict=True):
        if axis is None:
            replaced.append(tensor)
            continue
        numbers = torch.arange(tensor.shape[axis], device=tensor.device)
        numbers[1::2] = 0
        replaced.append(tensor.index_select(axis, numbers))
    # which rows an expert gets, and how many, may depend on all examples
    plain = {target: pair for target, pair in sites.items() if not isinstance(pair[0], Ragged)}
    _compare(graph, replaced, output, plain, "examples", MIXED_EXAMPLES)


def check_graphs_isolated(
    graph: Graph,
    tensors: Sequence[Tensor],
    rows: Sequence[Tensor],
    output: tuple[Layout, Tensor],
    sites: Mapping[str, tuple[Layout, Tensor]],
) -> None:
    """The same of a batch of graphs, whose floating-point inputs are replaced: edges and numbers stay.

    `rows` are the owners of graphs, nodes and edges. What could be a row of more than one kind is left as it is.

    Raises:
        LayoutError: as `check_isolated`.
    """
    replaced = []
    for tensor in tensors:
        fitting = [owner for owner in rows if tensor.ndim and tensor.is_floating_point() and len(owner) == len(tensor)]
        if len(fitting) != 1:
            replaced.append(tensor)
            continue
        numbers = torch.arange(len(tensor), device=tensor.device)
        replaced.append(tensor[torch.where(fitting[0].to(tensor.device) % 2 == 1, numbers[:1], numbers)])
    _compare(graph, replaced, output, sites, "graphs", MIXED_GRAPHS)


MIXED_EXAMPLES = (
    "Look for batch statistics (BatchNorm without running statistics), attention or means over the batch axis; if an "
    "input's examples are on another axis, name it with --example-axis NAME=AXIS."
)
MIXED_GRAPHS = (
    "Look for edges between graphs, norms or attention over all nodes of the batch; or take the whole batch as one "
    "example, without --example-index."
)


def looped(layer: str) -> LayoutError:
    """The error for a layer that is called as often as there are examples, or several times as often."""
    return LayoutError(
        "It is called once for each example, as in a loop over the batch, so that no axis of its rows holds them.",
        where=f"layer {layer}",
        remedy="Apply it to all examples at once, with the batch as an axis of its input.",
    )


def _compare(
    graph: Graph,
    replaced: Sequence[Tensor],
    output: tuple[Layout, Tensor],
    sites: Mapping[str, tuple[Layout, Tensor]],
    what: str,
    remedy: str,
) -> None:
    """Compare what every other example has in a pass over these inputs with what it had."""
    rows: dict[str, Tensor] = {}
    found = _pass(graph, replaced, sites, rows)
    changed = [
        site.layer
        for site in graph.sites()
        if site.target in rows and _moved(rows[site.target], _every_other(*sites[site.target]))
    ]
    if changed or _moved(_every_other(output[0], found), _every_other(*output)):
        raise LayoutError(
            f"The model mixes {what}: replacing some of them changes what the others have, so its loss has no "
            f"curvature for each of the {what} alone.",
            where=f"in front of layer {changed[0]}" if changed else "the model's output",
            remedy=remedy,
        )


def _pass(
    graph: Graph, tensors: Sequence[Tensor], sites: Mapping[str, tuple[Layout, Tensor]], rows: dict[str, Tensor]
) -> Tensor:
    """The output of a forward pass; `rows` gets those of every other example at each site."""

    def keeper(target: str) -> Any:
        def keep(module: Any, args: Any, result: Tensor) -> None:
            tensor = (result if isinstance(module, nn.Embedding) else args[0]).detach()
            layout, before = sites[target]
            if tensor.shape == before.shape:
                rows[target] = _every_other(layout, tensor).clone()

        return keep

    handles = [site.module.register_forward_hook(keeper(site.target)) for site in graph.sites() if site.target in sites]
    try:
        with torch.no_grad():
            return graph.run(*tensors).detach()
    finally:
        for handle in handles:
            handle.remove()


def _every_other(layout: Layout, tensor: Tensor) -> Tensor:
    return layout.split(tensor)[0::2]


def _moved(found: Tensor, before: Tensor) -> bool:
    """Whether rows differ by more than rounding; a number that is no longer finite differs."""
    size = float(before.abs().max()) if before.numel() else 0.0
    bound = ROUNDING * float(torch.finfo(before.dtype).eps) ** 0.5 * size
    return not bool(((found - before).abs() <= bound).all())
