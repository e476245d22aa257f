"""Settings and moments that can't be are named for what they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import curvscope


def assessed(change: Callable[[Any], None]) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    change(optimizer)
    run = curvscope.analyze(model, (x, y), loss="mse", optimizer=optimizer, measure=("stability",))
    rows = {row.quantity: row for row in run.tables["stability"] if row.scope == "network"}
    return rows["preconditioned_sharpness"], run


def group(**numbers: Any) -> Callable[[Any], None]:
    return lambda optimizer: optimizer.param_groups[0].update(numbers)


def moment(value: float) -> Callable[[Any], None]:
    def change(optimizer: Any) -> None:
        first = next(iter(optimizer.state.values()))
        first["exp_avg_sq"][0] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (group(lr=float("nan")), "its learning rate is not a number; give it with --lr"),
        (group(lr=-1.0), "its learning rate is -1, which has to be 0 or more and finite"),
        (group(betas=(1.5, 0.9)), "its beta1 is 1.5, which has to be 0 or more and below 1"),
        (group(betas=(0.9, 1.0)), "its beta2 is 1, which has to be 0 or more and below 1"),
        (group(eps=-1e-8), "its eps is -1e-08, which has to be 0 or more and finite"),
        (moment(float("nan")), "the state of 0.weight does not fit it: exp_avg_sq has values that are not finite"),
        (moment(-1.0), "0.weight does not fit it: exp_avg_sq, a mean or sum of squares, has negative values"),
    ],
)
def test_what_no_optimizer_has_is_not_assessed(change: Callable[[Any], None], words: str) -> None:
    row, run = assessed(change)
    assert (row.verdict, row.status) == ("not_assessed", "not_assessed")
    assert words in row.reason
    assert "lr nan" not in run.model.optimizer
    assert not {finding.code for finding in run.findings} & {"CS501", "CS506", "CS507", "CS508"}


def test_ends_of_the_ranges_are_assessed() -> None:
    row, _ = assessed(group(betas=(0.0, 0.999), eps=1e-8))
    assert row.status == "ok"
