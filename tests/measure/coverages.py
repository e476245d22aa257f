"""How often the 95 % intervals of estimates hold the exact numbers: models of every kind of layer, and the count."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvscope.curvature.block import Block
from curvscope.curvature.kronecker import Diagonal, EigenCorrected, Kronecker
from curvscope.extract.collector import Extract
from curvscope.measure.ekfac_estimate import MINIMUM_DRAWS as EKFAC_DRAWS
from curvscope.measure.estimate import estimated_errors, estimated_spectra
from curvscope.measure.jackknife import t_95
from curvscope.measure.terms import product, terms
from tests import models
from tests.measure.repeated import Repeated

Key = tuple[str, str, str]  # layer, approximation, quantity
Problem = tuple[nn.Module, Any, str]


class TinyGPT(nn.Module):
    """Token and position tables, a norm, one causal head of attention, an MLP, and a head tied to the tokens."""

    def __init__(self, vocabulary: int = 6, length: int = 5, d: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, d)
        self.position = nn.Parameter(0.5 * torch.randn(length, d))
        self.norm = nn.LayerNorm(d)
        self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.head = nn.Linear(d, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.position
        h = self.norm(x)
        future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        scores = (self.q(h) @ self.k(h).mT).masked_fill(future, float("-inf"))
        x = x + torch.softmax(scores, -1) @ self.v(h)
        return self.head(x + self.down(nn.functional.gelu(self.up(x))))


class Lookup(nn.Module):
    """An embedding, a linear layer on every token, running sums, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.body, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.tokens(tokens))).cumsum(1))


def mlp() -> Problem:
    return models.mlp(6, 5, 4), (torch.randn(16, 6), torch.randint(4, (16,))), "cross_entropy"


def tokens() -> Problem:
    """Attention: positions mix, every token has a term, and key gradients cancel in an example."""
    batch = (torch.randn(16, 3, 3), torch.randint(4, (16, 3)))
    return models.TokenModel(3, 4), batch, "cross_entropy:class_axis=last"


def conv() -> Problem:
    """With a norm, which has no factors."""
    layers = (nn.Conv2d(2, 3, 2), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))
    return nn.Sequential(*layers), (torch.randn(12, 2, 4, 4), torch.randint(3, (12,))), "cross_entropy"


def grouped() -> Problem:
    """A depthwise convolution behind a plain one."""
    convolutions = (nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU())
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return model, (torch.randn(16, 2, 6, 6), torch.randint(3, (16,))), "cross_entropy"


def lookup() -> Problem:
    return Lookup(), (torch.randint(6, (12, 4)), torch.randint(5, (12, 4))), "cross_entropy:class_axis=last"


def gpt() -> Problem:
    """A weight in two roles, a position table, a norm."""
    return TinyGPT(), (torch.randint(6, (12, 5)), torch.randint(6, (12, 5))), "cross_entropy:class_axis=last"


def autoencoder() -> Problem:
    x = torch.randn(20, 6) @ torch.randn(6, 6)
    return models.mlp(6, 3, 6), (x, x), "mse"


def trained() -> Problem:
    """Fitted until it is certain of most examples."""
    x = torch.randn(24, 6)
    y = (x[:, :4] + 0.7 * torch.randn(24, 4)).argmax(1)
    model = models.mlp(6, 8, 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    with torch.enable_grad():
        for _ in range(120):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model, (x, y), "cross_entropy"


MODELS: dict[str, Callable[[], Problem]] = {
    make.__name__: make for make in (mlp, tokens, conv, grouped, lookup, gpt, autoencoder, trained)
}


@cache
def repeated(model: str, certainty: float = 1.0) -> Repeated:
    """The model, with the outputs of its last linear layer multiplied by `certainty`: larger is more certain."""
    torch.manual_seed(0)
    network, batch, loss = MODELS[model]()
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.mul_(certainty)
    return Repeated(network, batch, loss)


def skewness(model: str, draws: int, certainty: float) -> float:
    """Of the mean trace of so many drawn labels' Hessians at the outputs."""
    source = repeated(model, certainty)
    variance, third = source.root("mc", 0, draws).draw_moments
    return float(third / variance**1.5 / draws**0.5)


def blocks_of(extract: Extract) -> list[Block]:
    """The block of every group."""
    spec, columns = extract.spec, extract.columns
    each = columns if isinstance(columns, list) else [columns]
    return [Block(one, spec.d_out // spec.groups, extract.width) for one in each if one is not None]


def exact_numbers(extract: Extract) -> dict[tuple[str, str], float]:
    """Errors and cosines of K-FAC, EKFAC and the diagonal, trace ratios and traces, from the exact columns."""
    blocks, known = blocks_of(extract), terms(extract)
    square, trace = sum(block.norm**2 for block in blocks), sum(block.trace for block in blocks)
    found = {("ggn", "trace"): trace}
    sums: dict[str, list[float]] = {"diag": [0.0, 0.0]}  # <G, M>, ||M||^2
    for block in blocks:
        of_diagonal = Diagonal(block).norm ** 2
        sums["diag"] = [total + of_diagonal for total in sums["diag"]]
    for flavour, given in known.items():
        kfac, ekfac, total = [0.0, 0.0], [0.0, 0.0], 0.0
        for group, block in enumerate(blocks):
            M = product([term.of_group(group) for term in given])
            kfac = [kfac[0] + M.inner(block), kfac[1] + M.norm**2]
            total += M.trace
            if isinstance(M, Kronecker):
                norm = EigenCorrected(M, block).norm ** 2
                ekfac = [ekfac[0] + norm, ekfac[1] + norm]
        if kfac[1] < 1e-20 * square:
            continue  # blind to rounding
        sums[f"kfac_{flavour}"] = kfac
        if not extract.roles:
            sums[f"ekfac_{flavour}"] = ekfac
        found |= {(f"kfac_{flavour}", "trace"): total, (f"kfac_{flavour}", "trace_ratio"): total / trace}
    for name, (inner, norm) in sums.items():
        found[name, "rel_frobenius"] = max(0.0, (square - 2 * inner + norm) / square) ** 0.5
        found[name, "cosine"] = inner / (square * norm) ** 0.5
    return found


def coverages(
    model: str, fisher: str, draws: int, repetitions: int, *, exact_factors: bool = False, certainty: float = 1.0
) -> dict[Key, tuple[float, float]]:
    """Of every number: how often its interval holds the exact one, and how often no number was given.

    With `exact_factors` only the block is drawn, as for single large layers of an otherwise exact run.
    """
    source = repeated(model, certainty)
    inside: dict[Key, list[float]] = defaultdict(list)
    exact = {layer: exact_numbers(extract) for layer, extract in source.exact.items()}
    for seed in range(repetitions):
        for layer, drawn in source.drawn(fisher, seed, draws).items():
            if exact_factors:
                drawn = dataclasses.replace(drawn, factors=source.exact[layer].factors, probe_B={})
            blocks = blocks_of(drawn)
            rows = estimated_errors(layer, fisher, drawn, blocks).rows
            traces = estimated_spectra(layer, drawn, blocks, 1.0)
            for (name, quantity), number in exact[layer].items():
                row = traces.get(name) if quantity == "trace" else rows.get(name)
                few = name.startswith("ekfac") and draws < EKFAC_DRAWS and not exact_factors
                # no draws in it; another row's double; not to be had from so few
                if row is None or few or (drawn.single and name.endswith("_reduce")):
                    continue
                value, stderr = getattr(row, quantity), getattr(row, f"{quantity}_stderr")
                assert quantity == "trace" or math.isnan(value) == math.isnan(stderr)
                hit = math.nan if math.isnan(stderr) else float(abs(value - number) <= t_95(draws - 1) * stderr)
                inside[layer, name, quantity].append(hit)
    return {
        key: (float(np.nanmean(hits)) if not np.isnan(hits).all() else math.nan, float(np.isnan(hits).mean()))
        for key, hits in inside.items()
    }
