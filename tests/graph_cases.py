"""Graphs, networks on them, and their curvature graph by graph: every graph runs alone, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class OneGraph:
    """Node features [n, d], edges [2, E] and their features [E, e]."""

    x: Tensor
    edges: Tensor
    edge_features: Tensor


def rings(sizes: list[int], features: int = 3, edge_features: int = 2, seed: int = 0) -> list[OneGraph]:
    """Rings with a chord, directed both ways; a ring of one is a node with a self-loop."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        i = torch.arange(size)
        pairs = torch.stack([i, (i + 1) % size])
        edges = torch.cat([pairs, pairs.flip(0)[:, : size - 1]], dim=1)
        x = torch.randn(size, features, generator=generator, dtype=torch.float64)
        found.append(OneGraph(x, edges, torch.randn(edges.shape[1], edge_features, generator=generator).double()))
    return found


def joined(graphs: list[OneGraph], shuffle: bool) -> tuple[dict[str, Tensor], Tensor]:
    """The batch as keyword tensors, and the order of its nodes: shuffled, graphs lie among each other."""
    sizes = [len(g.x) for g in graphs]
    batch = torch.repeat_interleave(torch.arange(len(graphs)), torch.tensor(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    edges = torch.cat([g.edges + start for g, start in zip(graphs, starts, strict=True)], dim=1)
    features = torch.cat([g.edge_features for g in graphs])
    generator = torch.Generator().manual_seed(7)
    order = torch.randperm(sum(sizes), generator=generator) if shuffle else torch.arange(sum(sizes))
    of_edges = torch.randperm(edges.shape[1], generator=generator) if shuffle else torch.arange(edges.shape[1])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    inputs = {
        "x": torch.cat([g.x for g in graphs])[order],
        "edge_index": place[edges][:, of_edges],
        "batch": batch[order],
        "edge_attr": features[of_edges],
    }
    return inputs, order


def pooled(h: Tensor, batch: Tensor) -> Tensor:
    """The sum over each graph's nodes, its size read off the batch vector as PyG does."""
    return h.new_zeros(int(batch.max()) + 1, h.shape[1]).index_add(0, batch, h)


class Messages(nn.Module):
    """Node and edge layers, a norm, an elementwise gate, a linear layer over pairs of nodes; classes a graph."""

    def __init__(self, of_nodes: bool = False, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.of_nodes = of_nodes
        self.node = nn.Linear(3, width)
        self.edge = nn.Linear(2 + 2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Parameter(torch.randn(width))
        self.update = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, edge_attr: Tensor) -> Tensor:
        h = torch.tanh(self.node(x))
        pairs = torch.cat([edge_attr, h[edge_index[0]], h[edge_index[1]]], dim=1)
        messages = torch.tanh(self.edge(pairs)) * self.gate
        h = self.norm(h.index_add(0, edge_index[1], messages))
        h = torch.tanh(self.update(h))
        return self.head(h if self.of_nodes else pooled(h, batch))


@dataclass
class Curvature:
    """One layer's gradient, exact block and factors."""

    gradient: Tensor
    G: Tensor
    A: dict[str, Tensor]
    B: dict[str, Tensor]


def hessians(loss: Callable[[Tensor, Any], Tensor], outputs: list[Tensor], targets: Any) -> tuple[list[Tensor], Tensor]:
    """The Hessian of the loss in each graph's outputs (all graphs' terms counting), and its gradient in all."""
    sizes = [o.numel() for o in outputs]
    flat = torch.cat([o.detach().flatten() for o in outputs])

    def of_flat(values: Tensor) -> Tensor:
        return loss(values.view(-1, outputs[0].shape[-1]), targets)

    full = torch.autograd.functional.hessian(of_flat, flat)
    gradient = torch.autograd.functional.jacobian(of_flat, flat)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    blocks = [full[end - size : end, end - size : end] for size, end in zip(sizes, ends, strict=True)]
    return blocks, gradient


def curvature(
    model: nn.Module, graphs: list[OneGraph], layers: list[str], loss: Callable[[Tensor, Any], Tensor], targets: Any
) -> dict[str, Curvature]:
    """Every layer's curvature: `targets` follow the graphs' own order. Linear layers only (weight, bias)."""
    model = model.double().eval()
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    outputs = []
    for graph in graphs:
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda module, args, result, name=name: seen[name].append((args[0].detach(), result))
            )
            for name in layers
        ]
        inputs, _ = joined([graph], shuffle=False)
        outputs.append(model(**inputs))
        for handle in handles:
            handle.remove()
    H, slope = hessians(loss, outputs, targets)
    ends = torch.tensor([o.numel() for o in outputs]).cumsum(0).tolist()
    found = {}
    for name in layers:
        bias = getattr(model.get_submodule(name), "bias", None) is not None
        total: Any = 0
        gradient: Any = 0
        A: dict[str, Any] = {"expand": 0, "reduce": 0}
        B: dict[str, Any] = {"expand": 0, "reduce": 0}
        rows = there = 0
        for n, (a, result) in enumerate(seen[name]):
            flat = outputs[n].flatten()
            g = torch.stack(
                [torch.autograd.grad(value, result, retain_graph=True)[0].flatten(0, -2) for value in flat]
            )  # [D, R, d_out]
            a = a.flatten(0, -2)
            a = torch.cat([a, a.new_ones(len(a), 1)], 1) if bias else a
            J = torch.einsum("dro,ri->doi", g, a).flatten(1)
            total = total + J.T @ H[n] @ J
            gradient = gradient + slope[ends[n] - len(flat) : ends[n]] @ J
            summed = g.sum(1)
            B["expand"] = B["expand"] + torch.einsum("dro,de,erp->op", g, H[n], g)
            B["reduce"] = B["reduce"] + summed.T @ H[n] @ summed
            A["expand"] = A["expand"] + a.T @ a
            rows += len(a)
            if len(a):
                mean = a.mean(0)
                A["reduce"] = A["reduce"] + torch.outer(mean, mean)
                there += 1
        A = {"expand": A["expand"] / rows, "reduce": A["reduce"] / there}
        found[name] = Curvature(gradient, total, A, B)
    return found


def parameter_block(
    model: nn.Module, graphs: list[OneGraph], names: list[str], loss: Callable[[Tensor, Any], Tensor], targets: Any
) -> Tensor:
    """The exact block of some parameters together, from the Jacobian of each graph alone."""
    model = model.double().eval()
    parameters = [dict(model.named_parameters())[name] for name in names]
    outputs = [model(**joined([graph], shuffle=False)[0]) for graph in graphs]
    H, _ = hessians(loss, outputs, targets)
    total: Any = 0
    for output, h in zip(outputs, H, strict=True):
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters, retain_graph=True)])
            for value in output.flatten()
        ]
        J = torch.stack(rows)
        total = total + J.T @ h @ J
    return total
