"""How often the 95 % interval of an estimate holds the exact number: in 90 to 99 % of repetitions."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from curvscope.curvature.kronecker import Diagonal, EigenCorrected, Kronecker
from curvscope.extract.collector import Extract
from curvscope.measure.ekfac_estimate import halves
from curvscope.measure.estimate import estimated_rows, estimated_spectra
from curvscope.measure.jackknife import t_95
from tests import models
from tests.measure.repeated import Repeated, block_of

REPETITIONS = 200
DRAWS = 8
Key = tuple[str, str, str]  # layer, approximation, quantity


def mlp() -> Repeated:
    batch = (torch.randn(16, 6), torch.randint(4, (16,)))
    return Repeated(models.mlp(6, 5, 4), batch, "cross_entropy")


def tokens() -> Repeated:
    """Attention: positions mix, every token has a term, and key gradients cancel in an example."""
    batch = (torch.randn(16, 3, 3), torch.randint(4, (16, 3)))
    source = Repeated(models.TokenModel(3, 4), batch, "cross_entropy:class_axis=last")
    del source.jacobian["q"]  # much as the keys
    return source


def conv() -> Repeated:
    """With a norm, which has no factors."""
    layers = (nn.Conv2d(2, 3, 2), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))
    batch = (torch.randn(12, 2, 4, 4), torch.randint(3, (12,)))
    return Repeated(nn.Sequential(*layers), batch, "cross_entropy")


MODELS: dict[str, Callable[[], Repeated]] = {"mlp": mlp, "tokens": tokens, "conv": conv}


@cache
def repeated(model: str) -> Repeated:
    torch.manual_seed(0)
    return MODELS[model]()


def exact_numbers(extract: Extract) -> dict[tuple[str, str], float]:
    """Errors of K-FAC and the diagonal, and traces, from the exact columns."""
    block = block_of(extract)
    found = {("ggn", "trace"): block.trace}
    matrices = {f"kfac_{flavour}": Kronecker(*pair) for flavour, pair in extract.factors.items()}
    for name, M in {**matrices, "diag": Diagonal(block)}.items():
        inner = M.inner(block) if isinstance(M, Kronecker) else M.norm**2
        square = (block.norm**2 - 2 * inner + M.norm**2) / block.norm**2
        found |= {(name, "rel_frobenius"): square**0.5, (name, "cosine"): inner / (block.norm * M.norm)}
        found |= {(name, "trace_ratio"): M.trace / block.trace, (name, "trace"): M.trace}
    return found


def ekfac_numbers(exact: Extract, drawn: Extract, draws: int) -> dict[tuple[str, str], float]:
    """Errors of EKFAC against the exact block, in the bases that each half of the draws gives."""
    block, found = block_of(exact), {}
    for flavour, (A, B) in exact.factors.items():
        each = drawn.probe_B.get(flavour)
        bases = [B] if each is None else [each[half].sum(0) for half in halves(draws)]
        squares = [EigenCorrected(Kronecker(A, basis), block).norm ** 2 for basis in bases]
        share = float(np.mean(squares)) / block.norm**2
        found |= {(f"ekfac_{flavour}", "rel_frobenius"): (1 - share) ** 0.5}
        found |= {(f"ekfac_{flavour}", "cosine"): share**0.5}
    return found


def coverages(
    model: str, fisher: str, draws: int, repetitions: int, *, exact_factors: bool = False
) -> dict[Key, tuple[float, float]]:
    """Of every number: how often its interval holds the exact one, and how often no number was given.

    With `exact_factors` only the block is drawn, as for single large layers of an otherwise exact run.
    """
    source = repeated(model)
    inside: dict[Key, list[float]] = defaultdict(list)
    exact = {layer: exact_numbers(extract) for layer, extract in source.exact.items()}
    for seed in range(repetitions):
        for layer, drawn in source.drawn(fisher, seed, draws).items():
            if exact_factors:
                drawn = dataclasses.replace(drawn, factors=source.exact[layer].factors, probe_B={})
            want = exact[layer] | (ekfac_numbers(source.exact[layer], drawn, draws) if draws >= 6 else {})
            rows = estimated_rows(layer, fisher, drawn, [block_of(drawn)])
            traces = estimated_spectra(layer, drawn, [block_of(drawn)], 1.0)
            for (name, quantity), number in want.items():
                row = traces.get(name) if quantity == "trace" else rows.get(name)
                blind = name == "kfac_reduce" and row is not None and "B is zero" in rows[name].reason
                if row is None or blind or (name, quantity) == ("diag", "trace_ratio"):
                    continue  # zero to rounding, and 1 by construction
                value, stderr = getattr(row, quantity), getattr(row, f"{quantity}_stderr")
                assert math.isnan(value) == math.isnan(stderr)
                hit = math.nan if math.isnan(value) else float(abs(value - number) <= t_95(draws - 1) * stderr)
                inside[layer, name, quantity].append(hit)
    return {key: (float(np.nanmean(hits)), float(np.isnan(hits).mean())) for key, hits in inside.items()}


@pytest.mark.parametrize(
    ("model", "fisher", "exact_factors"),
    [*product(MODELS, ("probe", "mc"), (False,)), ("conv", "probe", True)],
)
def test_intervals_hold_the_exact_number(model: str, fisher: str, exact_factors: bool) -> None:
    found = coverages(model, fisher, DRAWS, REPETITIONS, exact_factors=exact_factors)
    kinds = {(name.split("_")[0], quantity) for _, name, quantity in found}
    # of kfac (whose trace may be exact), ekfac, diag and ggn
    assert len(kinds) == 4 - exact_factors + 2 + 2 + 1
    covered = {key: share for key, (share, _) in found.items()}
    # 90 % itself, three standard errors of the repetition below it
    least = 0.9 - 3 * (0.9 * 0.1 / REPETITIONS) ** 0.5
    assert min(covered.values()) >= least, sorted(covered.items(), key=lambda item: item[1])[:5]
    assert 0.92 <= np.mean(list(covered.values())) <= 0.985
    # numbers are withheld only where the error is small against what so few draws resolve
    for (layer, name, quantity), (_, withheld) in found.items():
        if withheld > 0.02:
            assert quantity == "rel_frobenius", (layer, name, quantity)


if __name__ == "__main__":
    for model in MODELS:
        for fisher in ("probe", "mc"):
            for draws in (4, 8):
                shares = coverages(model, fisher, draws, 1000)
                print(f"\n{model} {fisher} K = {draws}")
                for key, (covered, withheld) in shares.items():
                    print(f"{key[0]:8} {key[1]:13} {key[2]:14} {covered:.3f}  none given {withheld:.3f}")
