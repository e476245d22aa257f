"""What an optimizer's state says of L2 decay and of its own damping."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import curvscope
from curvscope.errors import UsageError
from curvscope.load.decay import l2_decay, own_damping
from curvscope.load.optimizer import as_optimizer_state
from curvscope.load.problem import OptimizerState


@pytest.mark.parametrize(
    ("make", "coupled"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2), True),
        (lambda p: torch.optim.Adam(p, weight_decay=0.2), True),
        (lambda p: torch.optim.RMSprop(p, weight_decay=0.2), True),
        (lambda p: torch.optim.Adagrad(p, weight_decay=0.2), True),
        (lambda p: torch.optim.AdamW(p, weight_decay=0.2), False),
        (lambda p: torch.optim.Adam(p, weight_decay=0.2, decoupled_weight_decay=True), False),
        (lambda p: torch.optim.SGD(p, lr=0.1), False),
    ],
)
def test_only_coupled_decay_counts(make: Any, coupled: bool) -> None:
    model = nn.Linear(2, 2)
    state = as_optimizer_state(make(model.parameters()), model)
    assert l2_decay(state) == ({"weight": 0.2, "bias": 0.2} if coupled else {})
    assert own_damping(state) is None


def test_groups_have_rates_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [
        {"params": [model[1].weight], "weight_decay": 0.3, "damping": 0.01},
        {"params": [model[0].weight, model[0].bias, model[1].bias], "damping": 0.01},
    ]
    state = as_optimizer_state(torch.optim.SGD(groups, lr=0.1), model)
    assert l2_decay(state) == {"1.weight": 0.3}
    assert own_damping(state) == 0.01


def test_an_unknown_class_says_nothing() -> None:
    groups = [{"params": [0], "weight_decay": 0.3, "damping": 0.1}, {"params": [1], "damping": 0.2}]
    state = OptimizerState("unknown", ("a", "b"), {"param_groups": groups, "state": {}})
    assert l2_decay(state) == {}
    assert own_damping(state) is None
    assert l2_decay(None) == {}
    assert own_damping(None) is None


@pytest.mark.parametrize("damping", [1e300, 1e-300])
def test_a_stored_damping_beyond_float64_is_not_assessed(damping: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = type("KFAC", (torch.optim.SGD,), {})(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["damping"] = damping
    run = curvscope.analyze(model, (torch.randn(8, 3), torch.randn(8, 2)), loss="mse", optimizer=optimizer)
    assert run.layers["0"].ranges and all(
        f"damping of {damping:g} is not" in row.reason for row in run.layers["0"].ranges
    )
    assert all(math.isnan(row.current) for row in run.layers["0"].ranges)
    governs = next(row for row in run.tables["stability"] if row.quantity == "preconditioned_sharpness")
    assert governs.status == "not_assessed" and f"its damping is {damping:g}" in governs.reason


@pytest.mark.parametrize("damping", [1e300, 1e-300])
def test_a_given_damping_beyond_float64_is_refused(damping: float) -> None:
    for given in ({"damping": damping}, {"optimizer": f"kfac:lr=0.1,damping={damping}"}):
        with pytest.raises(UsageError, match="from 1e-100 to 1e\\+100"):
            curvscope.analyze(nn.Linear(3, 2), (torch.randn(8, 3), torch.randn(8, 2)), loss="mse", **given)


@pytest.mark.parametrize("damping", [1e100, 1e30, 1e-30, 1e-100])
def test_a_damping_far_off_the_grid_is_computed(damping: float, recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(3, 2)), (torch.randn(8, 3), torch.randn(8, 2))
    run = curvscope.analyze(model, batch, loss="mse", optimizer=f"kfac:lr=1,damping={damping}")
    row = run.layers["0"].ranges[0]
    assert row.current == damping
    assert damping <= row.recommended < 1e9 or row.recommended < 1e9 < damping
    assert not [one for one in recwarn if issubclass(one.category, RuntimeWarning)]
