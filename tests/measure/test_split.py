"""The split of K-FAC's error against its definition, dense and in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.kronecker import Kronecker
from curvscope.extract.collector import Columns
from curvscope.measure.split import reduced_rows, split_error

N, K, R, D_IN, D_OUT = 4, 3, 5, 3, 2


def rows(positions: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(N, positions, D_IN, generator=generator, dtype=torch.float64) + 0.7
    a[..., -1] = 1.0
    return a, torch.randn(K, N, positions, D_OUT, generator=generator, dtype=torch.float64)


def block_of(form: str, a: Tensor, g: Tensor) -> Block:
    V = torch.einsum("knro,nri->knoi", g, a)
    if form == "formed":
        flat = V.flatten(0, 1).flatten(1)
        return Block(Columns("formed", N, K, block=flat.T @ flat), D_OUT, D_IN)
    if form == "dense":
        return Block(Columns("dense", N, K, values=V), D_OUT, D_IN)
    return Block(Columns("outer" if a.shape[1] == 1 else "factored", N, K, inputs=a, gradients=g), D_OUT, D_IN)


def dense_terms(a: Tensor, g: Tensor, m: Tensor, A: Tensor, B: Tensor, G: Tensor) -> dict[str, Tensor]:
    """Spread, mean and cross as matrices, one position and column at a time."""
    spread, mean, diagonal = (torch.zeros_like(G) for _ in range(3))
    for n in range(a.shape[0]):
        for r in range(a.shape[1]):
            at = a[n, r] - m
            for k in range(K):
                gg = torch.outer(g[k, n, r], g[k, n, r])
                spread += torch.kron(gg, torch.outer(at, at))
                mean += torch.kron(gg, torch.outer(m, at) + torch.outer(at, m))
                diagonal += torch.kron(gg, torch.outer(a[n, r], a[n, r]))
    return {"spread": spread - torch.kron(B, A - torch.outer(m, m)), "mean": mean, "cross": G - diagonal}


@pytest.mark.parametrize("form", ["factored", "dense", "formed"])
@pytest.mark.parametrize("flavour", ["expand", "reduce"])
@pytest.mark.parametrize("positions", [1, R])
def test_shares_are_those_of_the_definition(form: str, flavour: str, positions: int) -> None:
    a, g = rows(positions)
    block = block_of(form, a, g)
    if flavour == "reduce":
        a, g = reduced_rows(a, g)
    A = torch.einsum("nri,nrj->ij", a, a) / (a.shape[0] * a.shape[1])
    B = torch.einsum("knro,knrp->op", g, g)
    kronecker, m, G = Kronecker(A, B), a.mean((0, 1)), block.dense()
    E = G - kronecker.dense()
    terms = dense_terms(a, g, m, A, B, G)
    torch.testing.assert_close(sum(terms.values()), E, rtol=0, atol=1e-12)
    found = split_error(block, kronecker, a, g, m, inner=kronecker.inner(block))
    for name, T in terms.items():
        assert getattr(found, name) == pytest.approx(float((T * E).sum() / E.square().sum()), abs=1e-8)
    assert found.spread + found.mean + found.cross == pytest.approx(1.0, abs=1e-8)
    assert found.relative == pytest.approx(float(E.norm() / G.norm()), rel=1e-8)
    if positions == 1:
        assert found.cross == pytest.approx(0.0, abs=1e-10)


def test_reduce_splits_into_sums_and_their_covariance() -> None:
    """Cross is sum U W^T + W U^T + W W^T with W = sum_r (g_r - gbar)(a_r - abar)^T."""
    a, g = rows(R, seed=1)
    V = torch.einsum("knro,nri->knoi", g, a)
    means, sums = reduced_rows(a, g)
    U = torch.einsum("knro,nri->knoi", sums, means)
    W = torch.einsum("knro,nri->knoi", g - g.mean(2, keepdim=True), a - a.mean(1, keepdim=True))
    torch.testing.assert_close(V, U + W)


def test_independent_curvature_leaves_nothing() -> None:
    """The same g at every input: G = B (x) A, and what is left has no causes to share."""
    a, _ = rows(1)
    g = torch.randn(K, 1, 1, D_OUT, dtype=torch.float64).expand(K, N, 1, D_OUT)
    block = block_of("factored", a, g)
    kronecker = Kronecker(torch.einsum("nri,nrj->ij", a, a) / N, torch.einsum("knro,knrp->op", g, g))
    found = split_error(block, kronecker, a, g, a.mean((0, 1)), inner=kronecker.inner(block))
    assert found.relative < 1e-6


def test_an_error_of_zero_to_the_last_digit_is_not_divided_by() -> None:
    """The same row of zeros and a one everywhere: every number is whole, and the error 0 without rounding."""
    a, g = torch.zeros_like(rows(1)[0]), torch.zeros(K, N, 1, D_OUT, dtype=torch.float64)
    a[..., 0], g[..., 0] = 1.0, 1.0
    block = block_of("factored", a, g)
    kronecker = Kronecker(torch.einsum("nri,nrj->ij", a, a) / N, torch.einsum("knro,knrp->op", g, g))
    found = split_error(block, kronecker, a, g, a.mean((0, 1)), inner=kronecker.inner(block))
    assert found.relative == 0.0
    assert all(math.isnan(share) for share in (found.spread, found.mean, found.cross))
