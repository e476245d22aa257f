"""Shifted solves by eigenvectors and by the tridiagonal form, against dense linear algebra in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvscope.curvature.eigen import eigh
from curvscope.curvature.shifted import EigenSolver, Solver
from curvscope.curvature.tridiagonal import TridiagonalSolver

SHIFTS = torch.logspace(-6, 3, 10, dtype=torch.float64)
EPS = torch.finfo(torch.float64).eps
# size and rank of S = X^T X
CASES = {"full": (60, 60), "one_less": (60, 59), "half": (61, 30), "rank_one": (40, 1), "two": (2, 2), "low": (7, 3)}


def made(size: int, rank: int, condition: float = 1e3) -> Tensor:
    """A semidefinite matrix whose nonzero eigenvalues spread over the condition."""
    generator = torch.Generator().manual_seed(size + rank)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0][:, :rank]
    values = torch.logspace(0, -float(torch.tensor(condition).log10()), rank, dtype=torch.float64) * 5
    return (basis * values) @ basis.T


def solvers(S: Tensor) -> dict[str, Solver]:
    relative = 4 * len(S) * EPS
    return {"eigenvectors": EigenSolver(*eigh(S), relative), "tridiagonal": TridiagonalSolver(S, relative)}


@pytest.mark.parametrize("route", ["eigenvectors", "tridiagonal"])
@pytest.mark.parametrize("case", CASES)
def test_solves_are_the_dense_ones(case: str, route: str) -> None:
    size, rank = CASES[case]
    S = made(size, rank)
    solver = solvers(S)[route]
    right = S @ torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    inward = solver.inward(right[:, None])[:, 0]
    c = solver.pseudo(inward)
    want = torch.linalg.pinv(S, hermitian=True, rtol=1e-12) @ right
    torch.testing.assert_close(solver.outward(c[:, None])[:, 0], want, rtol=1e-8, atol=1e-8 * float(want.norm()))
    steps = solver.shifted(c, SHIFTS)
    eye = torch.eye(size, dtype=torch.float64)
    for shift, step, product in zip(SHIFTS, steps, solver.times(steps), strict=True):
        y = torch.linalg.solve(S + shift * eye, want)
        for found, expected in ((step, y), (product, S @ y)):
            outward = solver.outward(found[:, None])[:, 0]
            torch.testing.assert_close(outward, expected, rtol=1e-8, atol=1e-8 * float(expected.norm()))
        solved = solver.solve(right, float(shift))
        torch.testing.assert_close(
            solved, torch.linalg.solve(S + shift * eye, right), rtol=1e-8, atol=1e-8 * float(right.norm())
        )
    assert solver.values.numel() == rank
    torch.testing.assert_close(solver.values, torch.linalg.eigvalsh(S)[-rank:], rtol=1e-9, atol=1e-13)


def test_routes_agree_at_a_large_condition() -> None:
    """Eigenvalues down to 1e-11 of the largest, and others that count as zero."""
    S = made(80, 50, 1e11)
    found = {}
    for name, solver in solvers(S).items():
        right = S @ torch.ones(80, dtype=torch.float64)
        c = solver.pseudo(solver.inward(right[:, None])[:, 0])
        found[name] = solver.outward(solver.shifted(c, SHIFTS * 1e-3).T)
        assert solver.values.numel() == 50
    # S (S + mu)^{-1} c is what steps are made of
    left, other = (S @ each for each in found.values())
    torch.testing.assert_close(left, other, rtol=1e-5, atol=1e-6 * float(left.abs().max()))


def test_a_zero_matrix() -> None:
    for solver in solvers(torch.zeros(5, 5, dtype=torch.float64)).values():
        assert solver.values.numel() == 0
        inward = solver.inward(torch.ones(5, 1, dtype=torch.float64))[:, 0]
        steps = solver.shifted(solver.pseudo(inward), SHIFTS)
        assert float(solver.outward(steps.T).abs().max()) == 0.0
