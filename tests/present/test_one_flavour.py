"""What is printed once where expand is reduce, what found no room, and shares without a minus zero."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
from rich.console import Console

from curvscope.present.names import spoken
from curvscope.present.numbers import whole_percent
from curvscope.present.terminal.damping import _bounded
from curvscope.present.terminal.page import Column, Page
from curvscope.records import Run, StabilityRow
from tests.present.test_terminal import page
from tests.synthetic import make_run


def one_position(run: Run) -> Run:
    """The run with one position in every layer."""
    run.layers = {
        name: dataclasses.replace(layer, row=dataclasses.replace(layer.row, positions=1.0, better_flavour="same"))
        for name, layer in run.layers.items()
    }
    run.tables["layers"] = [layer.row for layer in run.layers.values()]
    return run


@pytest.mark.parametrize("same", [True, False])
def test_one_column_and_one_row_for_both_flavours(same: bool) -> None:
    run = one_position(make_run()) if same else make_run()
    first, own = page(run), page(run, "head")
    assert ("expand = reduce, as every layer has one position" in " ".join(first.split())) == same
    table = own[own.index("approximations against") : own.index("spectra ─")]
    assert ("kfac_expand = reduce" in table) == same
    assert ("kfac_reduce" in table) != same


def test_damping_and_factors_of_both_flavours_are_shown_once() -> None:
    run = one_position(make_run())
    own = page(run, "stem.conv", width=140)
    damping = own[own.index("damping ─") : own.index("factors and arrays")]
    assert "kfac_reduce" not in damping
    assert "expand = reduce here" in damping
    factors = own[own.index("factors and arrays") :]
    assert "expand = reduce A" in factors
    assert "reduce A" not in factors.replace("expand = reduce A", "")


@pytest.mark.parametrize(
    ("value", "words"), [(8.1e-15, "≈0"), (-3e-16, "≈0"), (0.5, "0.500"), (math.nan, "–"), (2e-9, "2.0e-9")]
)
def test_a_ratio_of_nothing_but_rounding_is_about_zero(value: float, words: str) -> None:
    assert Page(Console(file=io.StringIO(), width=80), None).ratio(value, 6e-16 if value < 1e-9 else math.nan) == words


@pytest.mark.parametrize(("value", "words"), [(-7.6e19, "<-1e6"), (3e7, ">1e6"), (-58.7, "-58.7"), (math.nan, "–")])
def test_numbers_past_meaning_are_bounded(value: float, words: str) -> None:
    assert _bounded(Page(Console(file=io.StringIO(), width=80), None), value) == words


@pytest.mark.parametrize("width", [30, 40])
def test_a_terminal_that_is_too_narrow_is_told(width: int) -> None:
    words = " ".join(page(make_run(), width=width).split())
    assert ("30 columns: lines break below 40." in words) == (width < 40)


@pytest.mark.parametrize(("width", "told"), [(80, True), (220, False)])
def test_columns_without_room_are_named(width: int, told: bool) -> None:
    words = " ".join(page(make_run(), width=width).split())
    told_of = "No room here for kind, trace expand and reduce: on the layers' pages, or in a wider terminal."
    assert (told_of in words) == told


def test_headers_in_one_line() -> None:
    columns = [Column(header, [], 1) for header in ("posi-\ntions", "error\nexpand ", "error\nreduce ", "GGN\ncond.")]
    assert Page.left_out(columns, columns[:1]) == ["error expand and reduce", "GGN cond."]
    assert Page.left_out(columns, columns[1:]) == ["positions"]


@pytest.mark.parametrize(("share", "words"), [(-0.004, "0%"), (-0.006, "-1%"), (0.996, "100%"), (1.2, "120%")])
def test_no_minus_zero(share: float, words: str) -> None:
    assert whole_percent(share) == words


@pytest.mark.parametrize(("name", "words"), [("0", "layer 0"), ("2.1", "layer 2.1"), ("head", "head"), ("", "")])
def test_a_number_is_told_to_be_a_layer(name: str, words: str) -> None:
    assert spoken(name) == words


def test_growth_of_the_momentum_tells_of_no_margin() -> None:
    run = make_run()
    rows = run.tables["stability"]
    run.tables["stability"] = [
        dataclasses.replace(row, value=0.949, reason="the momentum's own rate")
        if row.quantity == "growth_factor"
        else row
        for row in rows
    ]
    words = " ".join(page(run).split())
    assert "0.949 times a step along the top direction, the momentum's own rate; stable up to" in words
    governs = next(row for row in rows if row.quantity == "preconditioned_sharpness" and row.scope == "network")
    assert f"{governs.value / governs.threshold:.2f} of it" in words


def test_unknown_signs_of_one_reason_share_a_line() -> None:
    run = make_run()
    run.tables["stability"] += [
        StabilityRow("layer", "head", name, status="not_assessed", reason="no rows")
        for name in ("mean_share", "condition_A")
    ]
    words = " ".join(page(run, "head").split())
    assert "not assessed: the mean's share of the inputs' energy; condition of A (no rows)" in words
