"""tables/damping of blocks with P in 300..500 against dense float64 linear algebra, to 1e-8."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.curvature import block
from curvscope.curvature.block import Block
from curvscope.extract.collector import Columns
from curvscope.measure.damping import DampingStage, Subject
from curvscope.records import DampingRow
from curvscope.run import Run

TOLERANCE = 1e-8


class Tied(nn.Module):
    """A table of 25 x 16 that is the head as well."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.mid = nn.Embedding(25, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 25, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.table(x)).cumsum(1)).mean(1))


def linear(examples: int, repeated: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    inputs = torch.randn(examples, 20, dtype=torch.float64)
    if repeated:
        inputs[examples // 2 :] = inputs[: examples - examples // 2]
    return nn.Sequential(nn.Linear(20, 18), nn.Tanh(), nn.Linear(18, 5)), inputs, torch.randint(5, (examples,))


def convolution(groups: int, examples: int) -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv1d(12, 12, 3, groups=groups), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4, bias=False)
    )  # fmt: skip
    return model, torch.randn(examples, 12, 6, dtype=torch.float64), torch.randint(4, (examples,))


def tokens(tied: bool) -> tuple[nn.Module, Tensor, Tensor]:
    x = torch.cat([torch.arange(25), torch.randint(25, (23,))]).view(16, 3)
    return Tied(tied), x, torch.randint(25, (16,))


# model and batch, layer, columns against parameters, and the least share of G's spectrum that is zero
CASES = {
    "few_columns": (lambda: linear(40), "0", "<", 0.3),
    "repeated_examples": (lambda: linear(60, repeated=True), "0", "<", 0.4),
    "more_columns": (lambda: linear(110), "0", ">", 0.0),
    "convolution": (lambda: convolution(1, 30), "0", "<", 0.7),
    "groups": (lambda: convolution(2, 30), "0", "<", 0.0),
    "embedding": (lambda: tokens(False), "table", "<", 0.0),
    "head": (lambda: tokens(False), "head", "<", 0.02),
    "tied": (lambda: tokens(True), "table", "<", 0.0),
}
assert all(case[2] in "<>" for case in CASES.values())


def built(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        model, inputs, targets = CASES[name][0]()
        return model.double(), inputs, targets


@cache
def run_of(name: str) -> Run:
    model, inputs, targets = built(name)
    return curvscope.analyze(
        model, (inputs, targets), loss="cross_entropy", damping=0.02, dtype="float64", fisher="exact",
        layers=(CASES[name][1],), measure=("damping", "kron_best"),
    )  # fmt: skip


def oracle(name: str) -> tuple[Tensor, Tensor]:
    """G and the gradient of the layer's weight (with its bias as last input), by automatic differentiation."""
    model, inputs, targets = built(name)
    names = dict(model.named_parameters())
    own = [key for key in names if key.rpartition(".")[0] == CASES[name][1]]
    values = [names[key].detach() for key in own]

    def outputs(*given: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(own, given, strict=True)), (inputs,))

    jacobians = torch.func.jacrev(outputs, argnums=tuple(range(len(own))))(*values)
    rows = values[0].shape[0]
    J = torch.cat([one.flatten(2).unflatten(2, (rows, -1)) for one in jacobians], 3).flatten(2)  # [N, C, P]
    p = torch.softmax(outputs(*values).detach(), 1)
    H = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(p)
    G = torch.einsum("ncp,ncd,ndq->pq", J, H, J)
    residual = (p - nn.functional.one_hot(targets, p.shape[1])) / len(p)
    return G, torch.einsum("ncp,nc->p", J, residual)


def product(found: curvscope.records.Layer, flavour: str) -> tuple[Tensor, Tensor]:
    """A and B of the whole layer, those of groups one after the other."""
    factors = found.factors[flavour]
    A, B = torch.as_tensor(factors.A), torch.as_tensor(factors.B)
    return (torch.diag(A) if A.ndim == 1 else A), B


def dense(found: curvscope.records.Layer, row: DampingRow, G: Tensor) -> tuple[Tensor, Tensor] | None:
    """M and its damped form at the row's damping; None for bases that the factors do not determine."""
    eye = torch.eye(len(G), dtype=torch.float64)
    kind, _, flavour = row.approximation.partition("_")
    if kind == "ggn":
        return G, G + row.damping * eye
    if kind == "diag":
        M = torch.diag(G.diagonal())
        return M, M + row.damping * eye
    if kind == "kron":
        return None
    A, B = product(found, flavour)
    if A.ndim == 2:
        A, B = A[None], B[None]
    matrices, damped = [], []
    for a, b in zip(A, B, strict=True):
        M = torch.kron(b, a)
        if kind == "ekfac":
            U_A, U_B = (torch.linalg.eigh(each)[1] for each in (a, b))
            if min(float(torch.linalg.eigvalsh(each).diff().min() / torch.linalg.norm(each)) for each in (a, b)) < 1e-7:
                return None
            U, low = torch.kron(U_B, U_A), len(matrices) * len(M)
            own = G[low : low + len(M), low : low + len(M)]
            M = (U * torch.einsum("pi,pq,qi->i", U, own, U)) @ U.T
        matrices.append(M)
        if row.form == "factored":
            pi = float((a.trace() / len(a)) / (b.trace() / len(b))) ** 0.5
            root = row.damping**0.5
            eyes = torch.eye(len(a), dtype=torch.float64), torch.eye(len(b), dtype=torch.float64)
            damped.append(torch.kron(b + root / pi * eyes[1], a + pi * root * eyes[0]))
        else:
            damped.append(M + row.damping * torch.eye(len(M), dtype=torch.float64))
    return torch.block_diag(*matrices), torch.block_diag(*damped)


def check(row: DampingRow, G: Tensor, M: Tensor, damped: Tensor, r: Tensor) -> None:
    """The columns by their definitions."""
    mu, eye = row.damping, torch.eye(len(G), dtype=torch.float64)
    x, p = torch.linalg.solve(G + mu * eye, r), torch.linalg.solve(damped, r)
    decrease, best, promised = (r @ v - v @ matrix @ v / 2 for v, matrix in ((p, G), (x, G), (p, M)))
    want = {
        "angle_degrees": math.degrees(math.acos(min(1.0, float(p @ x / p.norm() / x.norm())))),
        "length_ratio": float(p.norm() / x.norm()),
        "predicted_decrease": float(decrease),
        "decrease_share": float(decrease / best),
        "rho": float(decrease / promised),
        "effective_dimension": float(torch.linalg.solve(damped, M).trace()),
        "angle_to_gradient_degrees": math.degrees(math.acos(min(1.0, float(r @ p / r.norm() / p.norm())))),
        "gradient_distance": float((mu * p - r).norm() / r.norm()),
        "alpha_star": float(r @ p / (p @ G @ p + mu * p @ p)),
    }
    # what a difference of terms loses of its digits belongs to the dense side as well
    lost = float((r @ p).abs() / decrease.abs())
    for key, value in want.items():
        floor = 3e-6 if key.endswith("degrees") else 1e-12
        tolerance = TOLERANCE * (max(1.0, lost) if key in ("predicted_decrease", "decrease_share", "rho") else 1.0)
        assert getattr(row, key) == pytest.approx(value, rel=tolerance, abs=floor), (row, key)


@pytest.mark.parametrize("name", CASES)
def test_rows(name: str) -> None:
    G, r = (each.detach() for each in oracle(name))
    if CASES[name][1] == "table":  # the layer has tokens for inputs, the weight has them for rows
        order = torch.arange(400).view(25, 16).T.flatten()
        G, r = G[order][:, order], r[order]
    if name == "groups":  # blocks of groups alone
        G = torch.block_diag(*[G[i : i + len(G) // 2, i : i + len(G) // 2] for i in (0, len(G) // 2)])
    found = run_of(name).layers[CASES[name][1]]
    columns, P = found.row.columns, len(G)
    assert 300 <= P <= 500 or name == "groups"
    assert (columns < P) == (CASES[name][2] == "<")
    values = torch.linalg.eigvalsh(G)
    assert float((values < 1e-12 * values[-1]).double().mean()) >= CASES[name][3] * 0.9
    seen: dict[tuple[str, str], int] = {}
    for row in found.damping:
        # dense solves lose 1e-16 / relative damping of their digits, and the rounding of G's zeros comes on top
        if row.status != "ok" or row.damping < 1e-6 * float(values[-1]):
            continue
        both = dense(found, row, G)
        if both is not None:
            check(row, G, *both, r)
            seen[row.approximation, row.form] = seen.get((row.approximation, row.form), 0) + 1
    least = {("ggn", "eigenbasis"), ("diag", "eigenbasis")}
    if name != "tied":
        least |= {(f"kfac_{flavour}", form) for flavour in ("expand", "reduce") for form in ("eigenbasis", "factored")}
    assert set(seen) >= least
    assert min(seen.values()) >= 5


@pytest.mark.parametrize("repeated", [False, True], ids=["full", "deficient"])
def test_tridiagonal_route_gives_the_rows_of_eigenvectors(monkeypatch: pytest.MonkeyPatch, repeated: bool) -> None:
    """Outer products of 60 x 4 columns, N < d_in, by both routes; K-FAC's A has N nonzero eigenvalues at most."""
    from curvscope.curvature.kronecker import EigenCorrected, Kronecker

    generator = torch.Generator().manual_seed(1)
    a = torch.randn(30, 1, 40, dtype=torch.float64, generator=generator)
    g = torch.randn(4, 30, 1, 12, dtype=torch.float64, generator=generator)
    if repeated:
        a[15:], g[:, 15:] = a[:15], g[:, :15]
    kronecker = Kronecker(torch.einsum("nri,nrj->ij", a, a) / 30, torch.einsum("knro,knrp->op", g, g))
    rows = []
    for least in (10**9, 1):
        monkeypatch.setattr(block, "TRIDIAGONAL_FROM", least)
        one = Block(Columns("outer", 30, 4, inputs=a, gradients=g), 12, 40)
        c = torch.randn(120, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        stage = DampingStage(Subject("l", [one], one.combine(c), 1.0, torch.float64, current=0.1, always=True))
        corrected = EigenCorrected(kronecker, one, watch=stage.follow(0, "expand", kronecker))
        found, _ = stage.tables({"kfac_expand": [kronecker], "ekfac_expand": [corrected]})
        rows.append([row for row in found if row.relative > 1e-5])
    assert len(rows[0]) == len(rows[1]) > 20
    for left, right in zip(*rows, strict=True):
        for field in dataclasses.fields(DampingRow):
            value = getattr(left, field.name)
            if isinstance(value, float):
                floor = 3e-6 if field.name.endswith("degrees") else 1e-14
                rel = 1e-5 if field.name == "condition" else TOLERANCE
                assert getattr(right, field.name) == pytest.approx(value, rel=rel, abs=floor, nan_ok=True), field.name
