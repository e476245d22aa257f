"""Graphs among the inputs: edge lists, and the batch vector that says which graph each node belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvscope.errors import BatchError

EDGE_NAMES = ("edge_index", "edge_label_index")
WHOLE = (torch.int64, torch.int32)


def edge_lists(names: Sequence[str], tensors: Sequence[Tensor], nodes: int | None = None) -> list[int]:
    """Which of the inputs are edge lists: whole numbers [2, E], each one a node.

    `nodes` is how many there are; by default the length of the node features, which are the first floating point input
    with at least two axes, or else the first input. An input called edge_index is an edge list in any case; others are
    none where there are fewer than three nodes: [2, E] may then be two examples.
    """
    pairs = [i for i, t in enumerate(tensors) if t.dtype in WHOLE and t.ndim == 2 and t.shape[0] == 2 and t.numel()]
    if nodes is None:
        features = [t for t in tensors if t.is_floating_point() and t.ndim >= 2]
        features += [t for i, t in enumerate(tensors) if t.ndim and i not in pairs]
        nodes = len(features[0]) if features else 0
    return [
        i
        for i in pairs
        if names[i].rpartition(".")[2] in EDGE_NAMES
        or (nodes > 2 and int(tensors[i].min()) >= 0 and int(tensors[i].max()) < nodes)
    ]


def batch_vector(names: Sequence[str], tensors: Sequence[Tensor], name: str | None) -> Tensor | None:
    """The input that `--example-index` names: the graph [nodes] of every node, int64; None where none is named.

    Raises:
        BatchError: there is no such input, it is no vector of whole numbers, or a graph has no node.
    """
    if name is None:
        return None
    where = "example_index (--example-index)"
    if name not in names:
        raise BatchError(
            f"There is no input named {name!r}; the inputs are {', '.join(names)}.",
            where=where,
            remedy="Name the batch vector by its keyword or its position (0, 1, ...).",
        )
    tensor = tensors[names.index(name)]
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or tensor.ndim != 1:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise BatchError(
            f"Input {name!r} is no batch vector: expected whole numbers of shape [nodes], got {kind} "
            f"{list(tensor.shape)}.",
            where=where,
            remedy="Name the input that holds the number of its graph for every node.",
        )
    index = tensor.long()
    counts = torch.bincount(index) if int(index.min()) >= 0 else torch.zeros(1, dtype=torch.long)
    if not bool(counts.all()):
        missing = "negative numbers" if int(index.min()) < 0 else f"no node of graph {int((counts == 0).nonzero()[0])}"
        raise BatchError(
            f"Input {name!r} has {missing}: graphs are numbered from 0, and each has at least one node.",
            where=where,
            remedy="Number the graphs of the batch 0, 1, ... without gaps.",
        )
    return index


def owners(tensors: Sequence[Tensor], edges: Sequence[int], index: Tensor, examples: int) -> list[Tensor]:
    """Whose each row of a tensor may be, one candidate for every kind of row that graph networks have.

    Rows are graphs; nodes; edges, which belong to the graph of the node that they start from; edges without self-loops;
    and either kind of edges with a self-loop of every node behind them, as graph convolutions add them.
    """
    found = [torch.arange(examples, device=index.device), index]
    for position in edges:
        pairs = tensors[position].to(index.device).long()
        if int(pairs.max()) >= len(index):
            continue
        proper = pairs[:, pairs[0] != pairs[1]]
        for kept in (pairs, proper) if proper.shape[1] < pairs.shape[1] else (pairs,):
            found += [index[kept[0]], torch.cat([index[kept[0]], index])]
    return found
