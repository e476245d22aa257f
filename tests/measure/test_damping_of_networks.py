"""tables/damping of real networks against dense linear algebra on the oracle's blocks, factors and gradients."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.errors import UsageError
from curvscope.load.problem import OptimizerState
from curvscope.measure.optimizer import damping_wishes
from curvscope.records import DampingRow
from curvscope.run import Run
from curvscope.settings import Settings
from tests import reference
from tests.cases import CASES, Case, expected
from tests.networks import graph_and_network

DECAY = 0.02
NAMES = ("ce_mean", "mse_one_output", "callable", "one_example", "conv2d", "attention", "token_outputs")
LAYERS = [(name, layer) for name in NAMES for layer in CASES[name].layers]


def optimizer(model: nn.Module, decay: float) -> torch.optim.Optimizer:
    found = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=decay)
    found.param_groups[0]["damping"] = 0.05
    return found


@cache
def run_of(name: str, decay: float) -> Run:
    case: Case = CASES[name]
    model, inputs, targets = case.build()
    return curvscope.analyze(
        model,
        (inputs, targets),
        loss=case.given or case.loss_fn,
        optimizer=optimizer(model, decay),
        dtype="float64",
        fisher="exact",
        measure="damping",
    )


def weights_of(name: str, layer: str) -> Tensor:
    model, *_ = CASES[name].build()
    known = CASES[name].layers[layer]
    weight = dict(model.named_parameters())[known.weight].detach()
    bias = [] if known.bias is None else [dict(model.named_parameters())[known.bias].detach()[:, None]]
    return torch.cat([weight.flatten(1), *bias], 1)


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def check(row: DampingRow, G: Tensor, M: Tensor, damped: Tensor, r: Tensor, decay: float) -> None:
    """The columns by their definitions, by dense solves in float64."""
    mu = row.damping + decay
    x = torch.linalg.solve(G + mu * eye(len(G)), r)
    p = torch.linalg.solve(damped, r)
    decrease = r @ p - p @ G @ p / 2 - decay * p @ p / 2
    best = r @ x - x @ G @ x / 2 - decay * x @ x / 2
    promised = r @ p - p @ M @ p / 2 - decay * p @ p / 2
    want = {
        "angle_degrees": math.degrees(math.acos(min(1.0, float(p @ x / p.norm() / x.norm())))),
        "length_ratio": float(p.norm() / x.norm()),
        "predicted_decrease": float(decrease),
        "decrease_share": float(decrease / best),
        "rho": float(decrease / promised),
        "effective_dimension": float(torch.linalg.solve(damped, M).trace()),
        "gradient_distance": float((mu * p - r).norm() / r.norm()),
        "alpha_star": float(r @ p / (p @ G @ p + mu * p @ p)),
    }
    for key, value in want.items():
        floor = 1e-5 if key == "angle_degrees" else 1e-12
        assert getattr(row, key) == pytest.approx(value, rel=1e-7, abs=floor), (row, key)


@pytest.mark.parametrize("decay", [0.0, DECAY], ids=["plain", "decay"])
@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_rows_of_networks(name: str, layer: str, decay: float) -> None:
    oracle = expected(name, layer)
    found = run_of(name, decay).layers[layer]
    r = (oracle.gradient + decay * weights_of(name, layer)).flatten()
    assert {row.mark for row in found.damping} >= {"current"} or any("current" in row.mark for row in found.damping)
    for row in found.damping:
        blind = "reduce" in row.approximation and "B is zero" in found.errors["kfac_reduce"].reason
        # dense solves lose what the smallest damping magnifies: those are compared in more digits elsewhere
        if row.approximation in ("kron_best",) or row.relative < 1e-3 or blind or row.status != "ok":
            continue
        mu = row.damping + decay
        if row.approximation == "ggn":
            M = oracle.G
        elif row.approximation.startswith("ekfac"):
            A, B = oracle.factors[row.approximation.removeprefix("ekfac_")]
            if not reference.ekfac_is_unique(oracle.G, A, B):
                continue
            M = oracle.approximations[row.approximation]
        else:
            M = oracle.approximations[row.approximation]
        damped = M + mu * eye(len(M))
        if row.form == "factored":
            A, B = oracle.factors[row.approximation.removeprefix("kfac_")]
            pi = ((A.trace() / len(A)) / (B.trace() / len(B))) ** 0.5
            damped = torch.kron(B + mu**0.5 / pi * eye(len(B)), A + pi * mu**0.5 * eye(len(A)))
        check(row, oracle.G, M, damped, r, decay)


def test_keys_have_no_factored_form_under_reduce() -> None:
    rows = run_of("token_outputs", 0.0).layers["mix.k"].damping
    factored = [row for row in rows if (row.approximation, row.form) == ("kfac_reduce", "factored")]
    assert [row.status for row in factored] == ["not_assessed"]
    assert "eigenbasis form" in factored[0].reason


class Mixed(nn.Module):
    """A grouped and a depthwise convolution, a norm and a position table."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(4, 6, 2, groups=2)
        self.depthwise = nn.Conv1d(6, 6, 2, groups=6, bias=False)
        self.norm = nn.LayerNorm(3)
        self.table = nn.Parameter(torch.randn(6, 3))
        self.head = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.depthwise(torch.tanh(self.grouped(x))))
        return self.head((torch.tanh(self.norm(h)) + self.table).flatten(1))


@cache
def mixed(**options: Any) -> Run:
    torch.manual_seed(0)
    model = Mixed().double()
    inputs, targets = torch.randn(5, 4, 5, dtype=torch.float64), torch.randint(3, (5,))
    given: dict[str, Any] = {"fisher": "exact", "dtype": "float64", "dump": ("blocks",)}
    return curvscope.analyze(model, (inputs, targets), loss="cross_entropy", damping=0.01, **(given | options))


@pytest.mark.parametrize("layer", ["grouped", "depthwise", "norm", "table"])
def test_groups_and_layers_without_factors(layer: str) -> None:
    found = mixed().layers[layer]
    assert found.block is not None
    torch.manual_seed(0)
    model = Mixed().double()
    inputs, targets = torch.randn(5, 4, 5, dtype=torch.float64), torch.randint(3, (5,))
    nn.functional.cross_entropy(model(inputs), targets).backward()
    own = [p.grad for name, p in model.named_parameters() if name.split(".")[0] == layer]
    if layer == "grouped":
        r = torch.cat([own[0].flatten(1), own[1][:, None]], 1).flatten()
    else:
        r = torch.cat([gradient.flatten() for gradient in own])
    G = torch.as_tensor(found.block)
    diagonal = torch.diag(G.diagonal())
    names = {row.approximation for row in found.damping}
    assert names == ({"ggn", "diag"} if layer in ("norm", "table") else names | {"kfac_expand", "kfac_reduce"})
    rows = [row for row in found.damping if row.approximation == "diag" and row.relative > 1e-3]
    assert len(rows) >= 5
    for row in rows:
        check(row, G, diagonal, diagonal + row.damping * eye(len(G)), r, 0.0)


@pytest.mark.parametrize("fisher", ["probe", "mc"])
def test_estimates_have_no_steps(fisher: str) -> None:
    run = mixed(fisher=fisher, samples=4, dump=())
    assert run.tables["ranges"] == []
    assert {row.status for row in run.tables["damping"]} == {"not_assessed"}
    assert all("exact columns" in row.reason for row in run.tables["damping"])


def test_one_position_has_one_kfac() -> None:
    rows = mixed().layers["head"].damping
    for form in ("eigenbasis", "factored"):
        both = [
            [row.predicted_decrease for row in rows if (row.approximation, row.form) == (f"kfac_{flavour}", form)]
            for flavour in ("expand", "reduce")
        ]
        assert both[0] == both[1] != []


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_damping_must_be_a_positive_number(value: float) -> None:
    with pytest.raises(UsageError, match="damping must be positive"):
        curvscope.analyze(
            nn.Linear(2, 2), (torch.randn(3, 2), torch.randint(2, (3,))), loss="cross_entropy", damping=value
        )


def state(name: str, groups: list[dict[str, Any]], names: tuple[str, ...]) -> OptimizerState:
    return OptimizerState(name, names, {"state": {}, "param_groups": groups})


@pytest.mark.parametrize(
    ("name", "groups", "current", "decay", "remark"),
    [
        ("KFAC", [{"params": [0, 1], "damping": 0.1, "weight_decay": 0.2}], 0.1, 0.2, False),
        ("AdamW", [{"params": [0, 1], "weight_decay": 0.2}], None, None, False),
        ("Adam", [{"params": [0, 1], "weight_decay": 0.2, "decoupled_weight_decay": True}], None, None, False),
        ("SGD", [{"params": [0], "weight_decay": 0.2}, {"params": [1], "weight_decay": 0.0}], None, None, True),
        ("SGD", [{"params": [0, 1], "weight_decay": 0.0}], None, None, False),
    ],
)  # fmt: skip
def test_what_the_optimizer_says(
    name: str, groups: list[dict[str, Any]], current: float | None, decay: float | None, remark: bool
) -> None:
    graph, _ = graph_and_network(nn.Linear(3, 2).double(), torch.randn(4, 3), torch.randint(2, (4,)), "cross_entropy")
    found = damping_wishes(state(name, groups, ("weight", "bias")), graph, Settings())
    assert found.current.get("model") == current
    assert found.decay.get("model") == decay
    assert ("model" in found.remarks) == remark
    assert damping_wishes(None, graph, Settings(damping=0.3)).current == {"model": 0.3}
    assert np.isclose(damping_wishes(None, graph, Settings(measure=("damping",))).always, True)
