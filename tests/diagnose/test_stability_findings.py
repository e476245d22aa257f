from __future__ import annotations

import dataclasses

import pytest

from curvscope.diagnose.rules import find
from curvscope.records import FindingRow, ModelInfo, StabilityRow

MODEL = ModelInfo("Net", "net.pt", "mse", 1.0, 1.0, 100, 1.0, 64, "[64, 2]", optimizer="SGD, lr 0.1", learning_rate=0.1)


def rows(verdict: str, value: float = 30.0, low: float = 25.0, high: float = 33.0) -> list[StabilityRow]:
    return [
        StabilityRow("network", "", "preconditioned_sharpness", value, low, high, 20.0, verdict),
        StabilityRow("network", "", "growth_factor", 2.0, 1.5, 2.3, 1.0, verdict),
        StabilityRow("network", "", "largest_stable_lr", 0.067, 0.061, 0.08, 0.1, verdict),
        StabilityRow("layer", "a", "direction_share", 0.7),
        StabilityRow("layer", "b", "direction_share", 0.3),
    ]


def found(table: list[StabilityRow]) -> dict[str, FindingRow]:
    return {row.code: row for row in find(MODEL, {}, [], table)}


@pytest.mark.parametrize(("low", "severity"), [(25.0, "warning"), (40.0, "warning"), (40.1, "error")])
def test_above_says_layer_growth_and_the_stable_rate(low: float, severity: str) -> None:
    row = found(rows("above", low=low))["CS501"]
    assert (row.severity, row.layer, row.title) == (severity, "a", "unstable at this learning rate")
    assert "on 64 examples" in row.evidence
    assert "a carries 70% of the top direction" in row.evidence
    assert "multiplies the deviation by 2" in row.evidence
    assert "under 0.061" in row.remedy
    assert "now 0.1" in row.remedy
    assert "damping" not in row.remedy
    kfac = dataclasses.replace(MODEL, optimizer="K-FAC, lr 1, damping 0.1, expand")
    assert "More damping" in find(kfac, {}, [], rows("above"))[0].remedy


def test_a_block_that_is_above_is_blamed_first() -> None:
    table = rows("above")
    table.append(StabilityRow("layer", "b", "preconditioned_sharpness", 24.0, 22.0, 25.0, 20.0, "above"))
    row = found(table)["CS501"]
    assert row.layer == "b"
    assert "its own block is above the threshold (24)" in row.evidence


@pytest.mark.parametrize(("share", "layer"), [(0.5, "a"), (0.49, "")])
def test_a_direction_spread_over_many_layers_names_none(share: float, layer: str) -> None:
    table = [dataclasses.replace(row, value=share) if row.layer == "a" else row for row in rows("above")]
    assert found(table)["CS501"].layer == layer


@pytest.mark.parametrize(
    ("verdict", "value", "high", "code"),
    [
        ("undecided", 19.0, 22.0, "CS502"),
        ("below", 12.0, 16.1, "CS502"),
        ("below", 16.1, float("nan"), "CS502"),
        ("below", 12.0, 15.9, None),
    ],
)
def test_near_and_far_below(verdict: str, value: float, high: float, code: str | None) -> None:
    assert set(found(rows(verdict, value=value, low=10.0, high=high))) == ({code} if code else set())


def test_not_assessed_is_never_silent() -> None:
    table = [StabilityRow("network", "", "preconditioned_sharpness", status="not_assessed", reason="no state")]
    row = found(table)["CS503"]
    assert "was not assessed: no state." in row.evidence
    assert row.severity == "info"
    assert find(MODEL, {}, [], []) == []


def clipped(verdict: str) -> list[StabilityRow]:
    return [
        StabilityRow("network", "", "clip_scale", 0.25, reason="the gradient's norm is 4 here, its bound 1"),
        StabilityRow("network", "", "clipped_sharpness", 60.0, 50.0, 66.0, 80.0, verdict, reason="holds for now"),
    ]


@pytest.mark.parametrize(
    ("verdict", "severity", "confidence", "words"),
    [
        ("below", "warning", 0.6, "puts the threshold at 80: below it. That holds for now."),
        ("undecided", "error", 0.9, "puts the threshold at 80: undecided."),
        ("above", "error", 0.9, "puts the threshold at 80: above it all the same."),
    ],
)
def test_clipping_tempers_an_error_where_the_clipped_step_is_stable(
    verdict: str, severity: str, confidence: float, words: str
) -> None:
    row = found([*rows("above", value=60.0, low=50.0, high=66.0), *clipped(verdict)])["CS501"]
    assert (row.severity, row.confidence) == (severity, confidence)
    assert "above the threshold 20." in row.evidence
    assert "0.25 times as long (the gradient's norm is 4 here, its bound 1)" in row.evidence
    assert words in row.evidence


def scheduled(verdict: str, value: float) -> list[StabilityRow]:
    reason = "OneCycleLR: in 7 scheduler steps, with today's sharpness and moments"
    return [StabilityRow("network", "", "scheduled_peak_lr", value, threshold=0.2, verdict=verdict, reason=reason)]


@pytest.mark.parametrize(
    ("verdict", "value", "severity"),
    [("below", 0.19, ""), ("undecided", 0.21, ""), ("above", 0.4, "info"), ("above", 0.41, "warning")],
)
def test_a_schedule_that_leads_over_the_threshold(verdict: str, value: float, severity: str) -> None:
    codes = found([*rows("below", value=5.0, low=4.0, high=6.0), *scheduled(verdict, value)])
    assert (codes["CS509"].severity if "CS509" in codes else "") == severity
    if severity:
        assert f"up to 0.2; the schedule goes to {value:.2g} (OneCycleLR: in 7" in codes["CS509"].evidence
    # what is unstable already needs no prophecy
    assert "CS509" not in found([*rows("above"), *scheduled(verdict, value)])


def test_kfac_that_is_safe_for_one_step_may_be_unstable_for_many() -> None:
    kfac = dataclasses.replace(MODEL, optimizer="K-FAC, lr 1, damping 0.1, expand")
    assert "one after another: both can hold" in find(kfac, {}, [], rows("above"))[0].remedy
    shampoo = dataclasses.replace(MODEL, optimizer="Shampoo, lr 1, damping 0.1")
    assert "one after another" not in find(shampoo, {}, [], rows("above"))[0].remedy


def test_a_lower_bound_speaks_for_no_rate() -> None:
    """An iteration that time cut short: a sharpness that is a lower bound is no ground to call a rate stable."""
    table = rows("undecided", value=0.014, low=float("nan"), high=float("nan"))
    table[0] = dataclasses.replace(table[0], status="not_converged", reason="the time was spent; a lower bound")
    table[2] = dataclasses.replace(table[2], value=150.0, status="not_converged", reason="an upper bound")
    told = found(table)
    assert "CS502" not in told
    assert "0.014 at least" in told["CS503"].evidence
    assert "--time" in told["CS503"].remedy
    assert not any("stable on this batch" in row.remedy for row in told.values())


@pytest.mark.parametrize(("low", "said"), [(0.05, "and on its parts"), (float("nan"), "stable on this batch (up to")])
def test_parts_are_claimed_only_where_they_are_known(low: float, said: str) -> None:
    table = rows("undecided", value=19.0, low=15.0, high=22.0)
    table[2] = dataclasses.replace(table[2], value=0.12, low=low, threshold=0.04)
    assert said in found(table)["CS502"].remedy


@pytest.mark.parametrize(("verdict", "severity"), [("below", "info"), ("above", "error"), ("not_assessed", "error")])
def test_moments_of_the_next_step_decide_over_stored_ones(verdict: str, severity: str) -> None:
    after = StabilityRow("network", "", "next_sharpness", 3.0, threshold=20.0, verdict=verdict)
    row = found([*rows("above", value=60.0, low=50.0, high=66.0), after])["CS501"]
    assert row.severity == severity
    assert ("the sharpness is 3, below the threshold" in row.evidence) == (severity == "info")
    assert ("Nothing to change" in row.remedy) == (severity == "info")


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        (15.9, "CS503", "is undecided: the sharpness is 15.9 on 64 examples, against a threshold of 20"),
        (16.1, "CS502", "cannot be told from the threshold 20"),
        (25.1, "CS503", "no halves of the batch"),
    ],
)
def test_without_halves_only_what_is_near_is_called_near(value: float, code: str, words: str) -> None:
    nan = float("nan")
    row = found(rows("undecided", value=value, low=nan, high=nan))[code]
    assert words in row.evidence
