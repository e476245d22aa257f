"""Root causes first, consequences under them, severities of the worst."""

from __future__ import annotations

import dataclasses

import pytest

from curvscope.diagnose.causes import CAUSES, SPECIFIC, ordered
from curvscope.diagnose.rules import find
from curvscope.diagnose.titles import Found, found
from curvscope.records import FindingRow, StabilityRow
from tests.diagnose.test_rules import MODEL, layer


def make(code: str, layer: str = "", severity: str = "info", size: float = 1.0, confidence: float = 0.7) -> Found:
    return found(code, severity, layer, "evidence.", "remedy.", size=size, confidence=confidence)


def chain(*given: Found, shares: dict[str, float] | None = None) -> list[tuple[str, str]]:
    table = [StabilityRow("layer", name, "direction_share", share) for name, share in (shares or {}).items()]
    return [(f"{row.code} {row.layer}".strip(), row.caused_by) for row in ordered(given, table)]


def test_unscaled_inputs_come_before_what_they_bring_about() -> None:
    rows = ordered([make("CS501", "b", "error"), make("CS205", "a"), make("CS202", "b"), make("CS213", "a")])
    assert [(row.code, row.caused_by, row.rank) for row in rows] == [
        ("CS213", "", 1),
        ("CS501", "CS213 a", 2),
        ("CS202", "CS213 a", 3),
        ("CS205", "CS213 a", 4),
    ]
    assert rows[0].severity == "error"


def test_exploding_weights_saturate_units_and_spoil_factors() -> None:
    given = [make("CS206", "b"), make("CS203", "b", "warning"), make("CS211", "a")]
    assert chain(*given) == [("CS211 a", ""), ("CS203 b", "CS211 a"), ("CS206 b", "CS203 b")]


def test_a_poisoned_example_carries_the_curvature() -> None:
    given = [make("CS501", "", "warning"), make("CS207"), make("CS214", severity="warning")]
    assert chain(*given) == [("CS214", ""), ("CS501", "CS214"), ("CS207", "CS214")]


@pytest.mark.parametrize(("share", "cause"), [(0.1, "CS504 a"), (0.09, "")])
def test_a_rate_that_stands_out_needs_a_part_in_the_direction(share: float, cause: str) -> None:
    found = dict(chain(make("CS501", "b", "error"), make("CS504", "a"), shares={"a": share, "b": 0.8}))
    assert found["CS501 b"] == cause


@pytest.mark.parametrize(("weights", "first"), [(True, "CS210 head"), (False, "CS505")])
def test_certain_outputs_are_a_cause_where_their_weights_are_out_of_scale(weights: bool, first: str) -> None:
    given = [make("CS505", severity="warning"), make("CS210", "head", "warning")]
    given += [make("CS211", "head")] if weights else []
    rows = chain(*given)
    assert rows[0] == (first, "")
    assert all(cause for _, cause in rows[1:])


def test_ill_conditioned_factors_are_told_as_consequences_only() -> None:
    assert chain(make("CS206", "a")) == []
    assert chain(make("CS206", "a"), make("CS205", "a")) == [("CS205 a", ""), ("CS206 a", "CS205 a")]


@pytest.mark.parametrize(("severity", "told"), [("info", False), ("warning", True)])
def test_missing_norms_are_told_where_they_matter(severity: str, told: bool) -> None:
    assert bool(chain(make("CS215", severity=severity))) == told
    assert chain(make("CS215"), make("CS501", "", "error"))[0] == ("CS215", "")


@pytest.mark.parametrize(("severity", "first"), [("info", "CS501"), ("warning", "CS212 r")])
def test_a_recurrent_weight_is_a_cause_where_it_is_a_warning(severity: str, first: str) -> None:
    assert chain(make("CS501", "", "error"), make("CS212", "r", severity))[0] == (first, "")


def test_the_worse_root_comes_first_then_the_more_specific() -> None:
    given = [make("CS507", severity="warning"), make("CS201", "x", "error"), make("CS212", "r", "warning")]
    assert [name for name, _ in chain(*given)] == ["CS201 x", "CS212 r", "CS507"]


def test_every_finding_is_placed_once_even_in_a_circle() -> None:
    """No two findings may wait for each other."""
    codes = sorted({*CAUSES, *SPECIFIC, *(code for causes in CAUSES.values() for code, _ in causes)})
    codes = [code for code in codes if not code.startswith("CS4")]
    given = [make(code, name, "warning") for code in codes for name in ("a", "b")]
    rows = ordered(given, [StabilityRow("layer", name, "direction_share", 0.5) for name in ("a", "b")])
    assert [row.rank for row in rows] == list(range(1, len(given) + 1))
    placed: set[str] = set()
    for row in rows:
        assert not row.caused_by or row.caused_by in placed
        placed.add(f"{row.code} {row.layer}")


@pytest.mark.parametrize(
    ("optimizer", "severity"),
    [("", "warning"), ("K-FAC, lr 0.1", "warning"), ("Shampoo, lr 0.1", "warning"), ("AdamW, lr 0.1", "info"),
     ("SGD, lr 0.1", "info")],
)  # fmt: skip
def test_the_fit_of_a_product_matters_to_those_who_use_one(optimizer: str, severity: str) -> None:
    model = dataclasses.replace(MODEL, optimizer=optimizer)
    rows: list[FindingRow] = find(model, {"a": layer(0.9, 0.8)}, [])
    assert [(row.code, row.severity) for row in rows] == [("CS102", severity)]


def test_settings_come_before_the_weights_that_they_blew_up() -> None:
    given = [make("CS211", "a"), make("CS501", "", "error"), make("CS507", severity="warning")]
    assert chain(*given)[0] == ("CS507", "")
