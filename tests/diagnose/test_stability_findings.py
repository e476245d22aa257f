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
