"""Damped steps against dense linear algebra: in float64, and in 34 digits where float64 loses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.kronecker import Approximation, Diagonal, EigenCorrected, Kronecker
from curvscope.extract.collector import Columns, Form
from curvscope.measure.damping import DampingStage, Subject
from curvscope.records import DampingRow, RangeRow

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
    "factored_long": lambda: made("factored", 3, 4, positions=7),
    "dense": lambda: made("dense", positions=3),
    "dependent": lambda: made("dense", positions=2, rank=3),
    "rank_one": lambda: made("dense", positions=2, rank=1),
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


@dataclass(frozen=True)
class Given:
    """A layer with its approximations."""

    subject: Subject
    approximations: dict[str, list[Approximation]]
    blind: frozenset[str] = frozenset()


def subject(block: Block, gradient: Tensor, **options: Any) -> Given:
    given: dict[str, Any] = {"scale": 1.0, "dtype": torch.float64, "always": True}
    found = options.pop("approximations", None) or approximations(block)
    blind = options.pop("blind", frozenset())
    return Given(Subject("layer", [block], gradient=gradient, **(given | options)), found, blind)


def damping_tables(given: Given, *, followed: bool = True) -> tuple[list[DampingRow], list[RangeRow]]:
    """The stage's tables; the steps of K-FAC and EKFAC summed during EKFAC's pass, or all after it."""
    stage = DampingStage(given.subject)
    for name, groups in given.approximations.items() if followed else ():
        kind, _, flavour = name.partition("_")
        for group, one in enumerate(groups):
            if kind == "kfac":
                assert isinstance(one, Kronecker)
                EigenCorrected(one, given.subject.blocks[group], watch=stage.follow(group, flavour, one))
    return stage.tables(given.approximations, given.blind)


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


@pytest.mark.parametrize("name", ["outer", "factored", "dense", "formed"])
def test_condition_is_the_dense_one(name: str) -> None:
    block = BLOCKS[name]()
    given = subject(block, gradients(block, True), current=0.7, decay=0.01, weights=gradients(block, False))
    rows, _ = damping_tables(given)
    seen = 0
    for matrix, (one,) in given.approximations.items():
        forms = ("eigenbasis", "factored") if isinstance(one, Kronecker) else ("eigenbasis",)
        for row in (row for form in forms for row in by_place(rows, matrix, form)):
            assert np.isfinite(row.condition) == bool(row.mark)
            if not row.mark:
                continue
            shift = row.damping + 0.01
            damped = one.dense() + shift * torch.eye(block.parameters)
            if row.form == "factored":
                A, B = one.A, one.B  # type: ignore[union-attr]
                pi = ((A.trace() / A.shape[0]) / (B.trace() / B.shape[0])) ** 0.5
                eyes = torch.eye(A.shape[0]), torch.eye(B.shape[0])
                damped = torch.kron(B + shift**0.5 / pi * eyes[1], A + pi * shift**0.5 * eyes[0])
            values, vectors = torch.linalg.eigh(damped)
            root = (vectors / values.sqrt()) @ vectors.T
            inner = torch.linalg.eigvalsh(root @ (block.dense() + shift * torch.eye(block.parameters)) @ root)
            assert row.condition == pytest.approx(float(inner[-1] / inner[0]), rel=1e-5)
            seen += 1
    assert seen >= 6


def test_groups_are_one_block_diagonal_layer() -> None:
    """Two groups against one dense layer of both."""
    blocks = [made("dense", 2, 3, positions=2), made("dense", 2, 3)]
    gradient = torch.cat([gradients(block, True) for block in blocks])
    weights = torch.randn(gradient.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    each = [approximations(block) for block in blocks]
    one_layer = Subject("layer", blocks, gradient, 1.0, torch.float64, current=0.2, decay=0.01, weights=weights)
    rows, ranges = damping_tables(Given(one_layer, {name: [one[name][0] for one in each] for name in each[0]}))
    V = torch.block_diag(*[columns(block) for block in blocks])
    whole = Block(Columns("dense", V.shape[1], 1, values=V.T.reshape(1, -1, 4, 3)), 4, 3)
    dense = Dense(whole, gradient, 0.01, weights)
    for name in each[0]:
        M = precise(torch.block_diag(*[one[name][0].dense() for one in each]))
        for row in by_place(rows, name, "eigenbasis")[3::4]:
            compare(row, dense.row(M, dense.damped(M, row.damping + 0.01), row.damping), 1e-7)
    assert {(row.approximation, row.form) for row in ranges} >= {("kfac_expand", "factored"), ("diag", "eigenbasis")}


def test_the_unit_of_the_columns_drops_out() -> None:
    """Columns in multiples of a unit give the same rows as columns in the loss's own scale."""
    block = made("dense", positions=2)
    assert block.columns.values is not None
    unit = 1e3
    large = Block(Columns("dense", N, K, values=block.columns.values * unit), block.d_out, block.d_in)
    gradient, weights = gradients(block, True), gradients(block, False)
    options: dict[str, Any] = {"current": 0.3, "decay": 0.02, "weights": weights, "always": False}
    plain = damping_tables(subject(block, gradient, approximations={"diag": [Diagonal(block)]}, **options))
    scaled = damping_tables(
        subject(large, gradient, approximations={"diag": [Diagonal(large)]}, scale=unit**-2, **options)
    )
    for left, right in zip([*plain[0], *plain[1]], [*scaled[0], *scaled[1]], strict=True):
        for name, value in vars(left).items():
            if isinstance(value, float):
                assert getattr(right, name) == pytest.approx(value, rel=1e-6, abs=1e-5, nan_ok=True), name


def statuses(rows: list[DampingRow], name: str, form: str = "eigenbasis") -> tuple[set[str], set[str]]:
    found = by_place(rows, name, form)
    return {row.status for row in found}, {row.reason for row in found}


def test_a_zero_factor_has_no_factored_form() -> None:
    block = made("factored", positions=2)
    zero = Kronecker(factor(block.d_in, 1), torch.zeros(block.d_out, block.d_out, dtype=torch.float64))
    rows, ranges = damping_tables(
        subject(block, gradients(block, True), approximations={"kfac_reduce": [zero]}, current=0.1)
    )
    assert statuses(rows, "kfac_reduce", "factored") == (
        {"not_assessed"},
        {"pi is undefined, a factor being zero: use the eigenbasis form"},
    )
    for row in by_place(rows, "kfac_reduce", "eigenbasis"):
        # the step is the gradient over the damping
        assert row.status == "ok"
        assert row.effective_dimension == 0.0
        assert row.gradient_distance == pytest.approx(0.0, abs=1e-12)
        assert row.angle_to_gradient_degrees == pytest.approx(0.0, abs=3e-6)
    assert [row.status for row in ranges if row.form == "factored"] == ["not_assessed"]


def test_blind_to_rounding_counts_as_zero() -> None:
    block = made("factored", positions=2)
    given = subject(block, gradients(block, True), blind=frozenset({"kfac_reduce"}))
    rows, _ = damping_tables(given)
    assert statuses(rows, "kfac_reduce", "factored")[0] == {"not_assessed"}
    assert statuses(rows, "kfac_expand", "factored")[0] == {"ok"}


def test_a_zero_gradient_has_no_step() -> None:
    block = made("dense", positions=2)
    rows, ranges = damping_tables(
        subject(block, torch.zeros(block.d_out, block.d_in, dtype=torch.float64), current=0.1)
    )
    assert {row.status for row in rows} == {"not_assessed"}
    assert {row.reason for row in rows} == {"the layer's gradient is zero, so there is no step"}
    assert all(np.isfinite(row.effective_dimension) and np.isnan(row.predicted_decrease) for row in rows)
    assert {row.status for row in ranges} == {"not_assessed"}


@pytest.mark.parametrize("current", [None, 0.1])
def test_a_zero_block_has_no_scale(current: float | None) -> None:
    values = torch.zeros(K, N, 3, 2, dtype=torch.float64)
    block = Block(Columns("dense", N, K, values=values), 3, 2)
    gradient = torch.ones(3, 2, dtype=torch.float64)
    rows, ranges = damping_tables(subject(block, gradient, approximations={"diag": [Diagonal(block)]}, current=current))
    if current is None:
        assert [row.status for row in rows] == ["not_assessed"]
        assert "zero on this batch" in rows[0].reason
        assert ranges == []
    else:
        for row in rows:
            assert row.damping == current
            assert row.length_ratio == pytest.approx(1.0)
            assert row.predicted_decrease == pytest.approx(6 / current)


def test_an_indefinite_approximation_is_not_assessed_at_small_damping() -> None:
    block = made("dense", positions=2)
    A = torch.diag(torch.tensor([1.0, 0.5, -0.01], dtype=torch.float64))
    one = Kronecker(A, torch.eye(block.d_out, dtype=torch.float64))
    rows, _ = damping_tables(subject(block, gradients(block, True), approximations={"kron_best": [one]}))
    for row in by_place(rows, "kron_best", "eigenbasis"):
        safe = row.damping > 0.02
        assert row.status == ("ok" if safe else "not_assessed")
        assert np.isfinite(row.predicted_decrease) == safe
        assert safe or "eigenvalues down to -1.0e-02" in row.reason


def test_float32_columns_are_summed_in_float64() -> None:
    """The same float32 numbers as float32 columns and as float64 ones."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 30, 10, 12, generator=generator) * torch.logspace(0, -3, 12)
    blocks = [Block(Columns("dense", 30, 4, values=each), 10, 12) for each in (values, values.double())]
    full = Kronecker(factor(12, 1), factor(10, 2))
    gradient = blocks[1].combine(torch.randn(120, dtype=torch.float64, generator=generator))
    low, high = (
        damping_tables(
            subject(block, gradient.float() if i == 0 else gradient, dtype=block.dtype, always=False,
                    approximations={"kfac_expand": [full], "diag": [Diagonal(block)]})
        )[0]
        for i, block in enumerate(blocks)
    )  # fmt: skip
    high = [row for row in high if "recommended" not in row.mark or row.relative in {r.relative for r in low}]
    compared = 0
    for row in low:
        match = [
            r
            for r in high
            if (r.approximation, r.form) == (row.approximation, row.form)
            and np.isclose(r.damping, row.damping, rtol=1e-6)
        ]
        if match and not row.reason:
            compared += 1
            assert row.predicted_decrease == pytest.approx(match[0].predicted_decrease, rel=1e-3)
            assert row.angle_degrees == pytest.approx(match[0].angle_degrees, abs=0.05)
    assert compared > 20
    assert any("float32" in row.reason for row in low)
    assert not any("float32" in row.reason for row in high)


def test_recommended_beats_the_grid() -> None:
    block = made("factored", 3, 4, positions=7)
    rows, ranges = damping_tables(subject(block, gradients(block, True)))
    for found in ranges:
        own = by_place(rows, found.approximation, found.form)
        assert found.decrease == max(row.predicted_decrease for row in own)
        assert found.recommended in [row.damping for row in own if "recommended" in row.mark]
        assert sum("recommended" in row.mark for row in own) == 1


# Eigenvalues of G and of M, and the gradient, where the decrease peaks beside another value of the grid than the best.
SEVERAL_PEAKS = (
    ((0.0028, 0.15, 520.0), (0.00018, 0.5, 31.0), (0.13, 0.058, -3.2)),
    ((3.9, 0.28, 280.0), (0.61, 0.06, 31.0), (0.13, -0.6, -1.7)),
    ((0.0028, 870.0, 13.0), (0.0043, 380.0, 2.5), (0.12, -19.0, 3.7)),
    ((26.0, 0.46, 20.0), (11.0, 0.11, 180.0), (-8.0, -1.7, 2.1)),
)


@pytest.mark.parametrize("case", SEVERAL_PEAKS, ids=str)
def test_the_highest_of_several_peaks_is_recommended(case: tuple[tuple[float, ...], ...]) -> None:
    G, M, r = (torch.tensor(values, dtype=torch.float64) for values in case)
    block = Block(Columns("dense", 3, 1, values=G.sqrt().diag().view(1, 3, 1, 3)), 1, 3)
    one = Kronecker(M.diag(), torch.eye(1, dtype=torch.float64))
    _, [found, *_] = damping_tables(subject(block, r[None], approximations={"kfac_expand": [one]}), followed=False)
    damping = G.mean() * torch.logspace(-8, 2, 2000, dtype=torch.float64)[:, None]
    p = r / (M + damping)
    assert found.decrease > 0.99 * float((p @ r - p.square() @ G / 2).max())
