"""Forward passes that are looked into: what the sites see, and what their outputs are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvscope.errors import ModelError
from curvscope.graph.functional import Graph
from curvscope.graph.sites import SiteModule
from curvscope.graph.tap import Tap


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
