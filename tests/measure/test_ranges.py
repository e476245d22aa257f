"""Safe range, refinement and noise on curves whose answers are known in closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from curvscope.measure.peaks import agree, golden_section, peaks
from curvscope.measure.ranges import (
    Curve,
    noise_below,
    range_row,
    safe_range,
    standing,
    with_form_gaps,
    with_joint,
)
from curvscope.records import DampingRow, GlobalDampingRow, RangeRow

NAN = math.nan
GRID = 10.0 ** np.arange(-4.0, 5.0)


def scalar(g: float, m: float, damping: np.ndarray = GRID) -> Curve:
    """P = 1: G = g, M = m, gradient 1, so that p = 1 / (m + damping)."""
    p = 1 / (m + damping)
    promised = p - m * p**2 / 2
    bend = g * p**2
    return Curve(damping, p, bend, (p - bend / 2) / promised, m * p, m * p, p / ((g + damping) * p**2))


def test_a_right_model_is_safe_from_the_grids_start() -> None:
    low, high, remark = safe_range(scalar(1.0, 1.0))
    assert math.isnan(low)
    # the distance m / (m + damping) is 1/10 at damping 9 m; the edge is read off between 1 and 10
    assert 8 < high < 10
    assert remark == ""


def test_the_lower_edge_is_where_rho_is_a_quarter() -> None:
    fine = np.geomspace(1e-4, 1e4, 1601)
    low, _, _ = safe_range(scalar(10.0, 1.0, fine))
    # (p - g p^2 / 2) / (p - m p^2 / 2) = 1/4 with s = m + damping: s = (4 g - m) / 6
    assert low == pytest.approx((4 * 10.0 - 1.0) / 6 - 1.0, rel=1e-2)


@pytest.mark.parametrize(("factor", "safe"), [(0.999, True), (1.001, False)])
def test_both_sides_of_rho(factor: float, safe: bool) -> None:
    """At one damping alone rho is just above or just below 1/4."""
    s = (4 * 10.0 - 1.0) / 6
    curve = scalar(10.0 * factor, 1.0, np.array([s - 1.0]))
    low, _, remark = safe_range(curve)
    assert math.isnan(low) == safe
    assert (remark == "") == safe


@pytest.mark.parametrize(("damping", "curved"), [(8.99, True), (9.01, False)])
def test_both_sides_of_gradient_descent(damping: float, curved: bool) -> None:
    _, high, remark = safe_range(scalar(1.0, 1.0, np.array([damping])))
    assert math.isnan(high) == curved
    assert ("plain gradient descent" in remark) != curved


def test_no_safe_range_says_so() -> None:
    low, high, remark = safe_range(scalar(1000.0, 1.0))
    assert low > high
    assert remark.startswith("no safe range")


def test_nothing_known() -> None:
    empty = Curve(*(np.full(3, NAN) for _ in range(7)))
    assert all(math.isnan(value) for value in safe_range(empty)[:2])
    assert peaks(empty) == {}
    assert math.isnan(noise_below(empty, 1))


@pytest.mark.parametrize("g", [3.0, 40.0, 800.0])
def test_refinement_finds_the_best_damping(g: float) -> None:
    """The best scalar step is 1 / g, at damping g - m; the decrease is flat there, and the grid a decade wide."""
    [(found, expected)] = peaks(scalar(g, 1.0)).items()
    best = 1 / (2 * g)
    p = 1 / (1.0 + found)
    assert p - g * p**2 / 2 > 0.995 * best
    assert expected == pytest.approx(best, rel=0.02)


def test_refinement_leaves_ends_alone() -> None:
    assert peaks(scalar(1.0, 1.0)) == {}


@pytest.mark.parametrize(("off", "same"), [(0.029, True), (0.031, False)])
def test_what_was_expected_is_checked(off: float, same: bool) -> None:
    curve = scalar(3.0, 1.0)
    best = float(curve.decrease.max())
    assert agree(curve, {1.0: float(curve.decrease[4]) + off * best}) == same


def test_golden_section() -> None:
    assert golden_section(lambda x: -((x - 0.3) ** 2), -2.0, 5.0) == pytest.approx(0.3, abs=5e-3)


@pytest.mark.parametrize(
    ("dimension", "alpha", "noisy"), [(9.0, 0.249, True), (8.99, 0.249, False), (9.0, 0.25, False)]
)
def test_both_sides_of_noise(dimension: float, alpha: float, noisy: bool) -> None:
    one = np.ones(1)
    curve = Curve(3.0 * one, one, one, one, one, dimension * one, alpha * one)
    assert math.isnan(noise_below(curve, 10)) != noisy


def test_standing() -> None:
    assert [standing(value, 1.0, 10.0) for value in (0.9, 1.0, 10.0, 11.0)] == [
        "too_small",
        "safe",
        "safe",
        "too_large",
    ]
    assert standing(0.1, NAN, NAN) == "safe"
    assert standing(0.1, 1.0, 0.01) == "too_small"


def rows(marks: dict[int, str], curve: Curve, **fields: Any) -> list[DampingRow]:
    return [
        DampingRow(
            "l", "kfac_expand", "eigenbasis", float(d), mark=marks.get(i, ""), predicted_decrease=float(loss), **fields
        )
        for i, (d, loss) in enumerate(zip(curve.damping, curve.decrease, strict=True))
    ]


def test_gain_and_edges() -> None:
    curve = scalar(10.0, 1.0)
    found = range_row(curve, rows({5: "recommended", 3: "current"}, curve), 0.1, 1, "a remark")
    assert found.recommended == 10.0
    assert found.gain == pytest.approx(1 - curve.decrease[3] / curve.decrease[5])
    assert found.standing == "too_small"
    assert found.reason == "a remark"
    right = scalar(1.0, 1.0)
    edge = range_row(right, rows({0: "recommended"}, right), NAN, 1)
    assert edge.reason == "the smallest damping of the grid is the best"
    assert edge.standing == ""
    none = range_row(right, rows({}, right), NAN, 1)
    assert none.status == "not_assessed"
    assert "no damping" in none.reason


def test_form_gaps_are_of_the_two_forms() -> None:
    curves = {("kfac_expand", "eigenbasis"): scalar(1.0, 1.0), ("kfac_expand", "factored"): scalar(1.0, 2.0)}
    given = [RangeRow("l", "kfac_expand", form, recommended=1.0) for form in ("eigenbasis", "factored")]
    given.append(RangeRow("l", "diag", "eigenbasis", recommended=1.0))
    first, second, third = with_form_gaps(given, curves)
    left, right = (float(curves["kfac_expand", form].decrease[4]) for form in ("eigenbasis", "factored"))
    assert first.form_gap == second.form_gap == pytest.approx(1 - right / left)
    assert math.isnan(third.form_gap)


@pytest.mark.parametrize(
    ("gain", "damping", "by_layer"),
    [(0.01, 1.0, True), (0.0, 1.0, False), (-0.1, 1.0, False), (math.nan, math.nan, True), (math.nan, 1.0, False)],
)
def test_dampings_by_layer_pay_where_they_lower_the_loss_more(gain: float, damping: float, by_layer: bool) -> None:
    row = GlobalDampingRow("kfac_expand", "eigenbasis", damping=damping, per_layer_change=-1.0, per_layer_gain=gain)
    assert row.by_layer == by_layer


def test_values_to_set_are_withheld_with_the_reason() -> None:
    names = ("kfac_expand", "kfac_reduce", "ekfac_expand", "diag")
    rows = [RangeRow("one", name, "eigenbasis", recommended=2.0, reason="limited") for name in names]
    rows.append(RangeRow("one", "kfac_expand", "eigenbasis", status="not_assessed", reason="nothing lowers"))
    summaries = [
        GlobalDampingRow("kfac_expand", "eigenbasis", per_layer_factor=5.0),
        GlobalDampingRow("kfac_reduce", "eigenbasis", per_layer_factor=5.0),
        GlobalDampingRow("ekfac_expand", "eigenbasis", status="not_assessed", reason="these are draws"),
    ]
    found = with_joint(rows, summaries, {("kfac_reduce", "eigenbasis"): "no better"})
    assert [row.joint for row in found] == pytest.approx([10.0, *[math.nan] * 4], nan_ok=True)
    assert [row.reason for row in found] == [
        "limited",
        "limited; joint: no better",
        "limited; joint: these are draws",
        "limited; joint: steps of all layers are not taken with this approximation",
        "nothing lowers; joint: no value of its own, it takes the one for all layers",
    ]
