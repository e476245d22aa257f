"""Damped steps against dense linear algebra: in float64, and in 34 digits where float64 loses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.kronecker import Approximation, Diagonal, EigenCorrected, Kronecker
from curvscope.extract.collector import Columns, Form
from curvscope.measure.damping import Subject, damping_tables
from curvscope.records import DampingRow

N, K = 3, 2


def made(form: Form, d_out: int = 4, d_in: int = 3, positions: int = 1, rank: int | None = None) -> Block:
    """A block of random columns kept in the given form; `rank` < N K makes the columns dependent."""
    generator = torch.Generator().manual_seed(d_out * 100 + d_in * 10 + positions)
    a = torch.randn(N, positions, d_in, dtype=torch.float64, generator=generator)
    g = torch.randn(K, N, positions, d_out, dtype=torch.float64, generator=generator)
    if form in ("outer", "factored"):
        return Block(Columns(form, N, K, inputs=a, gradients=g), d_out, d_in)
    values = torch.einsum("knro,nri->knoi", g, a)
    if rank is not None:
        flat = values.reshape(N * K, -1)
        flat[rank:] = torch.randn(N * K - rank, rank, dtype=torch.float64, generator=generator) @ flat[:rank]
    if form == "dense":
        return Block(Columns(form, N, K, values=values), d_out, d_in)
    flat = values.reshape(N * K, -1)
    return Block(Columns("formed", N, K, block=flat.T @ flat), d_out, d_in)


BLOCKS: dict[str, Callable[[], Block]] = {
    "outer": lambda: made("outer"),
    "outer_wide": lambda: made("outer", 2, 6),
    "factored": lambda: made("factored", positions=2),
    "dense": lambda: made("dense", positions=3),
    "dependent": lambda: made("dense", positions=2, rank=3),
    "formed": lambda: made("formed", 2, 2, positions=3),
    "formed_singular": lambda: made("formed", 3, 3, positions=2),
    "one_parameter": lambda: made("dense", 1, 1),
    "one_output": lambda: made("outer", 1, 5),
}


def columns(block: Block) -> Tensor:
    """V [P, N K] of any block, for a formed one its square root."""
    if block.columns.form != "formed":
        return block.stacked().flatten(1).T
    values, vectors = torch.linalg.eigh(block.dense())
    kept = values > 1e-12 * values.max()
    return vectors[:, kept] * values[kept].sqrt()


def factor(size: int, seed: int, rank: int | None = None) -> Tensor:
    X = torch.randn(size, rank or size + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return X @ X.T / X.shape[1]


def approximations(block: Block) -> dict[str, list[Approximation]]:
    full = Kronecker(factor(block.d_in, 1), factor(block.d_out, 2))
    poor = Kronecker(factor(block.d_in, 3, 1), factor(block.d_out, 4, 1))
    return {
        "kfac_expand": [full],
        "kfac_reduce": [poor],
        "ekfac_expand": [EigenCorrected(full, block)],
        "diag": [Diagonal(block)],
    }


def subject(block: Block, gradient: Tensor, **options: Any) -> Subject:
    given: dict[str, Any] = {"scale": 1.0, "dtype": torch.float64, "blind": frozenset(), "always": True}
    given["approximations"] = approximations(block)
    return Subject("layer", [block], gradient=gradient, **(given | options))


def gradients(block: Block, inside: bool) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    if inside:
        V = columns(block)
        flat = V @ torch.randn(V.shape[1], dtype=torch.float64, generator=generator)
    else:
        flat = torch.randn(block.parameters, dtype=torch.float64, generator=generator)
    return flat.view(block.d_out, block.d_in)


def precise(matrix: Tensor) -> mpmath.matrix:
    return mpmath.matrix(matrix.tolist())


class Dense:
    """Every column of a row by its definition, in 34 digits, from dense matrices."""

    def __init__(self, block: Block, gradient: Tensor, decay: float = 0.0, weights: Tensor | None = None) -> None:
        mpmath.mp.dps = 34
        self.size = block.parameters
        if block.columns.form == "formed":
            self.G = precise(block.dense())
        else:
            V = precise(columns(block))
            self.G = V * V.T
        self.decay = decay
        self.r = precise(gradient.reshape(-1, 1))
        if weights is not None:
            self.r += decay * precise(weights.reshape(-1, 1))
        self.exact: dict[float, mpmath.matrix] = {}

    def damped(self, M: mpmath.matrix, shift: float) -> mpmath.matrix:
        return M + mpmath.mpf(shift) * mpmath.eye(self.size)

    def factored(self, one: Kronecker, shift: float) -> mpmath.matrix:
        A, B, root = precise(one.A), precise(one.B), mpmath.sqrt(mpmath.mpf(shift))
        traces = [sum(X[i, i] for i in range(X.rows)) / X.rows for X in (A, B)]
        pi = mpmath.sqrt(traces[0] / traces[1])
        A += pi * root * mpmath.eye(A.rows)
        B += root / pi * mpmath.eye(B.rows)
        return mpmath.matrix(
            [
                [B[i // A.rows, j // A.rows] * A[i % A.rows, j % A.rows] for j in range(self.size)]
                for i in range(self.size)
            ]
        )

    def row(self, M: mpmath.matrix, damped: mpmath.matrix, damping: float) -> dict[str, float]:
        def dot(left: mpmath.matrix, right: mpmath.matrix) -> Any:
            return (left.T * right)[0]

        mu = mpmath.mpf(damping) + mpmath.mpf(self.decay)
        r, G = self.r, self.G
        if damping not in self.exact:
            self.exact[damping] = mpmath.lu_solve(self.damped(G, mu), -r)
        x, p = self.exact[damping], mpmath.lu_solve(damped, -r)

        def decrease(step: mpmath.matrix, matrix: mpmath.matrix) -> Any:
            return -(dot(r, step) + (dot(step, matrix * step) + self.decay * dot(step, step)) / 2)

        def degrees(a: mpmath.matrix, b: mpmath.matrix) -> Any:
            cosine = dot(a, b) / mpmath.sqrt(dot(a, a) * dot(b, b))
            return mpmath.degrees(mpmath.acos(min(cosine, mpmath.mpf(1))))

        difference = mu * p + r
        return {
            "angle_degrees": float(degrees(p, x)),
            "length_ratio": float(mpmath.sqrt(dot(p, p) / dot(x, x))),
            "predicted_decrease": float(decrease(p, G)),
            "decrease_share": float(decrease(p, G) / decrease(x, G)),
            "rho": float(decrease(p, G) / decrease(p, M)),
            "angle_to_gradient_degrees": float(degrees(p, -r)),
            "gradient_distance": float(mpmath.sqrt(dot(difference, difference) / dot(r, r))),
            "alpha_star": float(-dot(r, p) / dot(p, self.damped(G, mu) * p)),
        }


def compare(row: DampingRow, want: dict[str, float], tolerance: float) -> None:
    for name, value in want.items():
        # a cosine near 1 has half its digits: angles below 1e-6 degrees are rounding
        floor = 3e-6 if name.endswith("degrees") else 1e-14
        assert getattr(row, name) == pytest.approx(value, rel=tolerance, abs=floor), (row, name)


def by_place(rows: list[DampingRow], name: str, form: str) -> list[DampingRow]:
    return [row for row in rows if (row.approximation, row.form) == (name, form)]


@pytest.mark.parametrize(("inside", "decay"), [(True, 0.0), (False, 0.0), (True, 0.03)], ids=["in", "out", "decay"])
@pytest.mark.parametrize("name", BLOCKS)
def test_rows_are_their_definitions(name: str, decay: float, inside: bool) -> None:
    block = BLOCKS[name]()
    gradient = gradients(block, inside)
    weights = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    given = subject(block, gradient, current=0.7, decay=decay, weights=weights if decay else None)
    rows, _ = damping_tables(given)
    dense = Dense(block, gradient, decay, weights if decay else None)
    for matrix, (one,) in given.approximations.items():
        M = precise(one.dense())
        for form in ("eigenbasis", "factored") if isinstance(one, Kronecker) else ("eigenbasis",):
            found = by_place(rows, matrix, form)
            assert [row.damping for row in found] == sorted(row.damping for row in found)
            for row in (found[0], next(row for row in found if "current" in row.mark), found[-1]):
                shift = row.damping + decay
                damped = dense.damped(M, shift) if form == "eigenbasis" else dense.factored(one, shift)  # type: ignore[arg-type]
                # both sides start from float64 matrices, whose rounding the smallest damping magnifies
                loss = 1e-15 * max(float(one.norm), block.norm) / shift
                compare(row, dense.row(M, damped, row.damping), max(1e-8, 30 * loss))
                matrix64 = np.array(damped.tolist(), dtype=float)
                dimension = np.trace(np.linalg.solve(matrix64, one.dense().numpy()))
                assert row.effective_dimension == pytest.approx(dimension, rel=max(1e-8, 300 * loss))
    for row in by_place(rows, "ggn", "eigenbasis")[::5]:
        want = dense.row(dense.G, dense.damped(dense.G, row.damping + decay), row.damping)
        compare(row, want, max(1e-8, 3e-14 * block.norm / (row.damping + decay)))
