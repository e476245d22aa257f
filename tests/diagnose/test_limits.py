"""Thresholds in place of the shipped ones: what they change, and that the shipped ones change nothing."""

from __future__ import annotations

import dataclasses
import math

import pytest

from curvscope.diagnose.signs import sign_findings
from curvscope.diagnose.thresholds import SHIPPED, Thresholds
from curvscope.measure.signs import SIGNS, sign_row
from curvscope.records import ExampleRow, StabilityRow


def severities(limits: Thresholds, *rows: StabilityRow, share: float = 0.0) -> dict[str, str]:
    found = sign_findings(rows, (ExampleRow("", 3, share, math.nan),), limits)
    return {one.row.code: one.row.severity for one in found}


def test_nothing_is_judged_anew_without_limits() -> None:
    rows = [sign_row("eps_share", 0.6)]
    assert SHIPPED.judged(rows) is rows


@pytest.mark.parametrize(
    ("limit", "low", "high", "verdict"),
    [
        (0.5, 0.55, 0.7, "above"),
        (0.58, 0.55, 0.7, "undecided"),
        (0.7, 0.55, 0.7, "below"),
        (0.5, math.nan, math.nan, "above"),
    ],
)
def test_a_limit_takes_the_place_of_the_signs_own(limit: float, low: float, high: float, verdict: str) -> None:
    row = sign_row("eps_share", 0.6, low=low, high=high)
    other = sign_row("update_rms", 3.0)
    judged = Thresholds(limits={"eps_share": limit}).judged([row, other])
    assert judged[0] == dataclasses.replace(row, threshold=limit, verdict=verdict)
    assert judged[1] is other


def test_the_signs_own_limits_give_the_same_rows() -> None:
    rows = [sign_row(name, 0.7, layer="a") for name, sign in SIGNS.items() if not math.isnan(sign.threshold)]
    assert Thresholds(limits={name: sign.threshold for name, sign in SIGNS.items()}).judged(rows) == rows


@pytest.mark.parametrize(
    ("quantity", "code", "value", "field", "lenient", "strict"),
    [
        ("dead_units", "CS202", 0.8, "dead", 0.81, 0.8),
        ("recurrent_radius", "CS212", 2.5, "explodes", 2.5, 2.4),
        ("update_ratio", "CS508", 0.3, "large_step", 0.3, 0.29),
        ("weight_scale", "CS211", 7.0, "far", 2.01, 2.0),
        ("input_scale", "CS213", 10.0, "far", 2.01, 2.0),
        ("learning_rate_ratio", "CS504", 8.0, "far", 2.01, 2.0),
        ("odd_example", "CS214", 20.0, "far", 2.01, 2.0),
        ("odd_example", "CS214", 20.0, "carries", 0.3, 0.29),
    ],
)
def test_each_number_of_the_rules_on_both_sides(
    quantity: str, code: str, value: float, field: str, lenient: float, strict: float
) -> None:
    network = quantity in ("update_ratio", "odd_example")
    row = sign_row(quantity, value, layer="" if network else "a", reason="example 3")
    for number, severity in ((lenient, "info"), (strict, "warning")):
        limits = dataclasses.replace(SHIPPED, **{field: number})
        assert severities(limits, row, share=0.3)[code] == severity


@pytest.mark.parametrize(("factor", "told"), [(2.0, True), (2.1, False)])
def test_weights_out_of_step(factor: float, told: bool) -> None:
    rows = [sign_row("weight_scale", 4.0, layer="a"), *(sign_row("weight_scale", 2.0, layer=name) for name in "bc")]
    assert ("CS211" in severities(Thresholds(out_of_step=factor), *rows)) == told
