"""Every column of every table of a run over several batches is that of one batch of all their examples."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.extract import plan
from curvscope.extract.collector import Columns, Extract
from curvscope.graph.export import export_model
from curvscope.load.problem import Inputs
from curvscope.measure import layers
from curvscope.measure.layer import measure_layer
from tests.extract.test_many_batches import cnn
from tests.many import Tokens, cut, repeats, tokens

SIZES = [3, 3, 1]
RELATIVE, ABSOLUTE = 1e-9, 1e-12
# Shares of an error are sums of larger ones; and numbers that are rounding stand in no finding but for their size.
OF_SHARES = 1e-10
ROUNDING = re.compile(r"\d\.\de-[23]\d")
# What is left out for its time says how much that is, as timed.
SECONDS = re.compile(r"about \S+ s\b")
# An iteration over the whole network stops where it is good enough, after passes that depend on rounding.
COSTS = ("passes",)
SHARES = ("spread", "mean", "cross")
# What P^-1 G of a layer has as condition is found by an iteration, too, to this tolerance.
ITERATED = 1e-4


class Recurrent(nn.Module):
    """A table of tokens in two roles, with a padding token, and a GRU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, padding_idx=0)
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.rnn(self.table(ids))[0], self.table.weight)


@cache
def problem(name: str) -> tuple[Any, Any, str]:
    """A model, exported once, with its batch of 7 examples and its loss."""
    torch.manual_seed(0)
    classes = torch.tensor([0, 3, 1, 2, 2, 0, 3])
    if name == "images":
        return exported(cnn(), torch.randn(7, 2, 4, 4)), (torch.randn(7, 2, 4, 4), classes), "cross_entropy"
    if name in ("tokens", "padded tokens"):
        inputs, targets = tokens(7)
        if name == "tokens":
            inputs, targets = inputs | {"mask": torch.ones_like(inputs["mask"])}, targets.clamp(min=0)
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


@cache
def analyzed(name: str, fisher: str, *sizes: int) -> Any:
    """The run over batches of these sizes; of none, over all examples at once."""
    model, batch, loss = problem(name)
    whole = name == "regression"  # what is of the whole network: tests/measure/test_in_pieces.py has more of it
    return curvscope.analyze(
        model,
        cut(batch, list(sizes)) if sizes else batch,
        loss=loss,
        fisher=fisher,
        measure=("split", "damping", "kron_best", *(["steps", "stability"] if whole else [])),
        samples=8 if fisher in ("probe", "mc") else None,
        dtype="float64",
        optimizer="sgd:lr=0.3,momentum=0.5" if whole else None,
        dataset_size=50,
        time=1e6 if whole else 1e-3,
        seed=1,
    )


def differences(one: Any, other: Any, *, layers_only: bool = False) -> list[str]:
    """Every cell of the tables in which two runs differ."""
    found = []
    assert one.tables.keys() == other.tables.keys()
    for table, rows in one.tables.items():
        again = other.tables[table]
        if layers_only:
            rows, again = ([row for row in each if getattr(row, "layer", "")] for each in (rows, again))
        if len(rows) != len(again):
            found.append(f"{table}: {len(rows)} rows, {len(again)} rows")
            continue
        for left, right in zip(rows, again, strict=True):
            if getattr(left, "quantity", "") == "kronecker_limit" and is_exact(one.layers[left.layer]):
                continue  # a ratio of two errors that are rounding
            tolerance = rounding(one, table, left)
            for column, value in dataclasses.asdict(left).items():
                loose = max(ITERATED, tolerance) if (table, column) == ("damping", "condition") else tolerance
                if column not in COSTS and not same(value, getattr(right, column), column, loose):
                    found.append(f"{table} {label(left)} {column}: {value} {getattr(right, column)}")
    return found


def rounding(run: Any, table: str, row: Any) -> float:
    """How far rounding of 1e-14 may carry the numbers of a row, relatively.

    All the way where EKFAC's basis is arbitrary; by what is divided by where a matrix is (nearly) singular.
    """
    layer, name = run.layers.get(getattr(row, "layer", "")), getattr(row, "approximation", "")
    if layer is None:
        return RELATIVE
    if name.startswith("ekfac") and repeats(layer.factors.get(name.removeprefix("ekfac_"))):
        return math.inf
    if name not in layer.spectra:
        return RELATIVE
    spectrum = layer.spectra[name]
    if table == "spectra" and spectrum.condition == spectrum.condition:
        return max(RELATIVE, 1e-14 * spectrum.condition)
    if table == "damping" and row.damping > 0:
        largest = max(layer.spectra["ggn"].lambda_max, spectrum.lambda_max)
        return max(RELATIVE, 1e-14 * largest / row.damping)
    return RELATIVE


def is_exact(layer: Any) -> bool:
    return any(layer.errors[f"kfac_{flavour}"].rel_frobenius < 1e-6 for flavour in ("expand", "reduce"))


def label(row: Any) -> str:
    names = ("scope", "layer", "approximation", "quantity", "form", "damping", "code", "parameter")
    return " ".join(str(getattr(row, name)) for name in names if hasattr(row, name))


def same(one: Any, other: Any, column: str, tolerance: float) -> bool:
    if column == "reason" and math.isinf(tolerance):
        return True  # it may state the numbers
    if isinstance(one, str):
        one, other = (SECONDS.sub("", ROUNDING.sub("0", words)) for words in (one, other))
        return one == other
    if not isinstance(one, float) or math.isnan(one):
        return one == other or (isinstance(one, float) and math.isnan(other))
    if "degrees" in column:  # near 0 an angle has its cosine's digits
        return abs(math.cos(math.radians(one)) - math.cos(math.radians(other))) <= tolerance
    return math.isclose(one, other, rel_tol=tolerance, abs_tol=OF_SHARES if column in SHARES else ABSOLUTE)


@pytest.mark.parametrize(
    ("name", "fisher"),
    [
        ("images", "exact"),
        ("padded tokens", "exact"),
        ("padded tokens", "probe"),
        ("tied and recurrent", "exact"),
        ("tied and recurrent", "mc"),
        ("regression", "exact"),
        ("tokens", "exact"),
        ("tokens", "mc"),
    ],
)
def test_every_column(name: str, fisher: str) -> None:
    one, many = analyzed(name, fisher), analyzed(name, fisher, *SIZES)
    assert differences(one, many, layers_only=name != "regression") == []
    if name == "tokens":  # the numbers are there, and not alike for want of them
        rows = {row.quantity for row in many.tables["stability"] if row.layer == "qkv" and row.status == "ok"}
        # draws give no example's share, and a position's with a standard error
        assert rows >= ({"mean_share", "position_share"} if fisher == "exact" else {"mean_share"})
        if fisher == "exact":
            assert {row.status for row in many.layers["qkv"].sources.values()} == {"ok"}


@pytest.mark.parametrize(
    ("name", "fisher"), [("images", "probe"), ("padded tokens", "probe"), ("tied and recurrent", "mc")]
)
def test_draws_summed_one_by_one_are_those_kept_as_columns(
    name: str, fisher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups, several roles, look-ups and parameters without factors among them."""
    forms = {}

    def forced(form: str) -> None:
        monkeypatch.setattr(plan, "_bytes", lambda layer: (layer.form == "formed") != (form == "formed"))

    def kept(columns: Columns | list[Columns] | None) -> set[tuple[str, int]]:
        each = columns if isinstance(columns, list) else [] if columns is None else [columns]
        return {(one.form, 0 if one.block is None else one.block.ndim) for one in each}

    def noted(extract: Extract, *args: Any, **options: Any) -> Any:
        forms[extract.spec.name] = kept(extract.columns)
        return measure_layer(extract, *args, **options)

    monkeypatch.setattr(layers, "measure_layer", noted)
    forced("columns")
    one = analyzed.__wrapped__(name, fisher)
    assert not any("formed" in form for each in forms.values() for form, _ in each)
    forced("formed")
    many = analyzed.__wrapped__(name, fisher, *SIZES)
    assert set.union(*forms.values()) == {("formed", 3)}
    assert differences(one, many, layers_only=True) == []
