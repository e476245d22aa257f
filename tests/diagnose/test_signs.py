"""Findings from single signs: every threshold from both sides."""

from __future__ import annotations

import math

import pytest

from curvscope.diagnose.signs import confidence, sign_findings
from curvscope.diagnose.titles import Found
from curvscope.measure.signs import SIGNS, missing, sign_row
from curvscope.records import ExampleRow, StabilityRow


def codes(*rows: StabilityRow, examples: tuple[ExampleRow, ...] = ()) -> dict[str, Found]:
    return {one.row.code: one for one in sign_findings(rows, examples)}


BESIDE = 1e-6
SIMPLE = [
    ("dead_units", "CS202", "a", "info"),
    ("saturated_units", "CS203", "a", "warning"),
    ("dead_inputs", "CS204", "a", "info"),
    ("mean_share", "CS205", "a", "info"),
    ("position_share", "CS208", "a", "info"),
    ("recurrent_radius", "CS212", "a", "info"),
    ("input_scale", "CS213", "a", "info"),
    ("learning_rate_ratio", "CS504", "a", "info"),
    ("update_rms", "CS505", "", "warning"),
    ("eps_share", "CS506", "", "warning"),
    ("beta1_over_root_beta2", "CS507", "", "warning"),
    ("update_ratio", "CS508", "", "info"),
    ("example_share", "CS207", "", "info"),
]


@pytest.mark.parametrize(("quantity", "code", "layer", "severity"), SIMPLE)
def test_both_sides_of_a_threshold(quantity: str, code: str, layer: str, severity: str) -> None:
    limit = SIGNS[quantity].threshold
    found = codes(sign_row(quantity, limit * (1 + BESIDE), layer=layer, reason="example 3"))
    assert found[code].row.severity == severity
    assert found[code].row.layer == layer
    assert found[code].row.remedy
    assert code not in codes(sign_row(quantity, limit * (1 - BESIDE), layer=layer, reason="example 3"))
    assert not codes(missing(quantity, "unknown", layer=layer))


@pytest.mark.parametrize(("which", "share", "told"), [("A", 0.01, True), ("B", 0.01, True), ("A", 0.0, False)])
def test_factors_with_an_eigenvalue_that_is_not_resolved(which: str, share: float, told: bool) -> None:
    assert ("CS206" in codes(sign_row(f"unresolved_{which}", share, layer="a"))) == told
    assert not codes(missing("unresolved_A", "A is zero on this batch", layer="a"))


@pytest.mark.parametrize(
    ("quantity", "code", "layer", "limit", "severities"),
    [
        ("dead_units", "CS202", "a", 0.9, ("info", "warning")),
        ("recurrent_radius", "CS212", "a", 3.0, ("info", "warning")),
        ("update_ratio", "CS508", "", 0.5, ("info", "warning")),
        ("weight_scale", "CS211", "a", 14.0, ("info", "warning")),
        ("input_scale", "CS213", "a", 20.0, ("info", "warning")),
        ("learning_rate_ratio", "CS504", "a", 16.0, ("info", "warning")),
    ],
)
def test_what_is_a_warning_on_its_own(
    quantity: str, code: str, layer: str, limit: float, severities: tuple[str, str]
) -> None:
    for factor, severity in zip((1 - BESIDE, 1 + BESIDE), severities, strict=True):
        assert codes(sign_row(quantity, limit * factor, layer=layer))[code].row.severity == severity


@pytest.mark.parametrize(("low", "told"), [(2.2, False), (2.31, True)])
def test_a_spread_over_the_threshold_is_undecided(low: float, told: bool) -> None:
    row = sign_row("update_rms", 3.0, low=low, high=4.0)
    assert row.verdict == ("above" if told else "undecided")
    assert ("CS505" in codes(row)) == told


def test_a_layer_alone_has_no_stale_moments() -> None:
    assert not codes(sign_row("update_rms", 9.0, layer="a"), sign_row("update_rms", 1.0))


@pytest.mark.parametrize(("collapse", "logit", "told"), [(0.91, 51, True), (0.89, 51, False), (0.91, 49, False)])
def test_attention_collapses_with_large_logits_only(collapse: float, logit: float, told: bool) -> None:
    rows = [sign_row("attention_collapse", collapse, layer="q"), sign_row("attention_logit", logit, layer="q")]
    assert ("CS209" in codes(*rows)) == told


@pytest.mark.parametrize(
    ("gap", "wrong", "severity"),
    [(16.6, 0.1, ""), (16.7, 0.0, "info"), (16.7, 0.01, "warning"), (66.5, 0.0, "info"), (66.6, 0.0, "warning")],
)
def test_certain_outputs(gap: float, wrong: float, severity: str) -> None:
    found = codes(sign_row("logit_gap", gap, layer="head"), sign_row("wrong_and_certain", wrong, layer="head"))
    assert (found["CS210"].row.severity if found else "") == severity


@pytest.mark.parametrize(
    ("scale", "others", "told"), [(3.6, 1.0, True), (3.4, 1.0, False), (3.6, 1.19, True), (3.6, 1.21, False)]
)
def test_weights_stand_out_of_the_others(scale: float, others: float, told: bool) -> None:
    rows = [sign_row("weight_scale", scale, layer="a")]
    rows += [sign_row("weight_scale", others, layer=name) for name in "bcd"]
    assert ("CS211" in codes(*rows)) == told


@pytest.mark.parametrize(
    ("norms", "drift", "severity"), [(0, 9.9, "info"), (0, 10.1, "warning"), (1, 99.0, ""), (0, math.nan, "info")]
)
def test_networks_without_norms(norms: int, drift: float, severity: str) -> None:
    drifted = missing("signal_drift", "not seen") if math.isnan(drift) else sign_row("signal_drift", drift)
    found = codes(sign_row("normalisations", norms, reason="3 convolutions"), drifted)
    assert (found["CS215"].row.severity if found else "") == severity


@pytest.mark.parametrize(
    ("ratio", "share", "gradient", "severity"),
    [(9.9, 1.0, 1.0, ""), (10.1, 0.4, 0.5, "info"), (10.1, 0.51, 0.1, "warning"), (10.1, 0.1, 0.51, "warning")],
)
def test_an_example_out_of_scale(ratio: float, share: float, gradient: float, severity: str) -> None:
    listed = (ExampleRow("", 5, 0.9, 0.9), ExampleRow("", 3, share, gradient), ExampleRow("a", 3, 1.0, 1.0))
    found = codes(sign_row("odd_example", ratio, reason="example 3"), examples=listed)
    assert (found["CS214"].row.severity if found else "") == severity
    if severity:
        assert "Example 3" in found["CS214"].row.evidence


@pytest.mark.parametrize(
    ("value", "sure"), [(1.0, 0.5), (2.0, 0.7), (4.0, 0.9), (100.0, 0.95), (math.inf, 0.95), (0.5, 0.5)]
)
def test_confidence_grows_with_the_distance(value: float, sure: float) -> None:
    assert confidence(value, 1.0) == sure


@pytest.mark.parametrize(("sharpness", "severity"), [(0.99, "info"), (1.01, "warning")])
def test_rates_and_examples_warn_where_the_whole_batch_is_above(sharpness: float, severity: str) -> None:
    top = StabilityRow(
        "network", "", "preconditioned_sharpness", sharpness, threshold=1.0, verdict="undecided", status="ok"
    )
    found = codes(
        top, sign_row("learning_rate_ratio", 5.0, layer="a"), sign_row("odd_example", 11.0, reason="example 3")
    )
    assert [found[code].row.severity for code in ("CS504", "CS214")] == [severity, severity]


@pytest.mark.parametrize(("ratio", "severity"), [(39.9, "info"), (40.1, "warning")])
def test_an_example_far_out_of_scale_warns_without_shares(ratio: float, severity: str) -> None:
    assert codes(sign_row("odd_example", ratio, reason="example 3"))["CS214"].row.severity == severity
