"""Every column of every table of a run over several batches is that of one batch of all their examples."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.graph.export import export_model
from curvscope.load.problem import Inputs
from tests.many import Tokens, cut, tokens

SIZES = [3, 3, 1]
# What a number is compared with where it is a difference of larger ones, as errors of an exact K-FAC are.
ABSOLUTE = 1e-12
# An iteration over the whole network stops where it is good enough, after passes that depend on rounding.
COSTS = ("passes",)


class Recurrent(nn.Module):
    """A table of tokens in two roles, with a padding token, and a GRU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, padding_idx=0)
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.rnn(self.table(ids))[0], self.table.weight)


def images() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    net(torch.randn(32, 2, 4, 4))
    return net.eval()


@cache
def problem(name: str) -> tuple[Any, Any, str]:
    """A model, exported once, with its batch of 7 examples and its loss."""
    torch.manual_seed(0)
    classes = torch.tensor([0, 3, 1, 2, 2, 0, 3])
    if name == "images":
        return exported(images(), torch.randn(7, 2, 4, 4)), (torch.randn(7, 2, 4, 4), classes), "cross_entropy"
    if name == "padded tokens":
        inputs, targets = tokens(7)
        return exported(Tokens(), **inputs), (inputs, targets), "cross_entropy:class_axis=last"
    if name == "tied and recurrent":
        ids = torch.randint(1, 6, (7, 4))
        ids[2, 2:] = 0
        return exported(Recurrent(), ids), (ids, ids), "causal_lm:ignore_index=0"
    assert name == "regression"
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    return exported(model, torch.randn(7, 3)), (torch.randn(7, 3), torch.randn(7, 2)), "mse"


def exported(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> Any:
    return export_model(model, Inputs(args, kwargs), {}).program


def analyzed(name: str, fisher: str, sizes: list[int] | None) -> Any:
    model, batch, loss = problem(name)
    measure = ("steps", "stability", "split", "damping", "kron_best") if fisher == "exact" else ("stability",)
    return curvscope.analyze(
        model,
        batch if sizes is None else cut(batch, sizes),
        loss=loss,
        fisher=fisher,
        measure=measure,
        samples=8 if fisher in ("probe", "mc") else None,
        dtype="float64",
        optimizer="sgd:lr=0.3,momentum=0.5",
        dataset_size=50,
        time=1e6,
        seed=1,
    )


def differences(one: Any, other: Any) -> list[str]:
    """Every cell of the tables in which two runs differ."""
    found = []
    assert one.tables.keys() == other.tables.keys()
    for table, rows in one.tables.items():
        again = other.tables[table]
        if len(rows) != len(again):
            found.append(f"{table}: {len(rows)} rows, {len(again)} rows")
            continue
        for left, right in zip(rows, again, strict=True):
            for column, value in dataclasses.asdict(left).items():
                if column not in COSTS and not same(value, getattr(right, column), column):
                    found.append(f"{table} {label(left)} {column}: {value} {getattr(right, column)}")
    return found


def label(row: Any) -> str:
    names = ("scope", "layer", "approximation", "quantity", "form", "damping", "code", "parameter")
    return " ".join(str(getattr(row, name)) for name in names if hasattr(row, name))


def same(one: Any, other: Any, column: str) -> bool:
    if not isinstance(one, float) or math.isnan(one):
        return one == other or (isinstance(one, float) and math.isnan(other))
    if "degrees" in column:  # near 0 an angle has its cosine's digits
        one, other = math.cos(math.radians(one)), math.cos(math.radians(other))
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=ABSOLUTE)


@pytest.mark.parametrize("fisher", ["exact", "probe", "mc"])
@pytest.mark.parametrize("name", ["images", "padded tokens", "tied and recurrent", "regression"])
def test_every_column(name: str, fisher: str) -> None:
    one, many = analyzed(name, fisher, None), analyzed(name, fisher, SIZES)
    assert differences(one, many) == []
