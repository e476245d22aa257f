"""What an optimizer's state says of L2 decay and of its own damping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

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
