from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from curvscope.diagnose.rules import find
from curvscope.records import CoverageRow, ErrorRow, FindingRow, KroneckerFactors, Layer, LayerRow, ModelInfo, SourceRow

MODEL = ModelInfo("Net", "net.pt", "mse", 1.0, 1.0, 100, 1.0, 4, "[4, 2]")


def layer(expand: float, reduce: float, trace: tuple[float, float] = (1.0, 1.0), **changes: Any) -> Layer:
    row = LayerRow("a", "linear", 4, 6, False, 1, 24, 4, 5.0, 8, "expand" if expand < reduce else "reduce")
    errors = {
        f"kfac_{name}": ErrorRow("a", f"kfac_{name}", "exact", rel_frobenius=error, trace_ratio=ratio)
        for name, error, ratio in (("expand", expand, trace[0]), ("reduce", reduce, trace[1]))
    }
    errors |= {f"ekfac_{name}": ErrorRow("a", f"ekfac_{name}", "exact") for name in ("expand", "reduce")}
    return Layer(dataclasses.replace(row, **changes), errors=errors)


def packed(expand: list[float], reduce: list[float], **changes: Any) -> Layer:
    found = layer(0.3, 0.3, **changes)
    found.factors = {
        name: KroneckerFactors(name, np.eye(4), np.diag(diagonal).astype(np.float32))
        for name, diagonal in (("expand", expand), ("reduce", reduce))
    }
    return found


def findings(found: Layer, model: ModelInfo = MODEL) -> dict[str, FindingRow]:
    return {row.code: row for row in find(model, {"a": found}, [])}


@pytest.mark.parametrize(
    ("expand", "reduce", "words"),
    [(0.9, 0.55, "Use K-FAC-reduce"), (0.6, 1.2, "Use K-FAC-expand"), (0.9, 0.8, "")],
)
def test_the_closer_flavour_is_named_where_both_are_far_off(expand: float, reduce: float, words: str) -> None:
    remedy = findings(layer(expand, reduce))["CS102"].remedy
    assert remedy.startswith(words)
    assert words or "Use K-FAC" not in remedy


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (0.097, "understates the curvature about 10 times"),
        (0.3, "understates the curvature about 3.3 times"),
        (2.5, "overstates the curvature about 2.5 times"),
        (1234.0, "overstates the curvature about 1,200 times"),
    ],
)
def test_a_trace_that_is_off_is_told_in_times(ratio: float, words: str) -> None:
    row = findings(layer(0.3, 0.3, (ratio, ratio)))["CS104"]
    assert words in row.evidence
    assert words.partition("curvature ")[2] + " too" in row.remedy


ONES = [1.0] * 6
KEYS_GONE = [2.0, 2.0, 1e-13, 0.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("expand", "reduce", "changes", "told"),
    [
        pytest.param(ONES, KEYS_GONE, {}, True, id="keys vanish under reduce"),
        pytest.param(ONES, ONES, {}, False, id="nothing vanishes"),
        pytest.param(KEYS_GONE, KEYS_GONE, {}, False, id="vanish under both"),
        pytest.param(ONES, [0.0, 0.0, 0.0, 0.0, 3.0, 3.0], {}, False, id="another third vanishes, too"),
        pytest.param(ONES, KEYS_GONE, {"kind": "conv2d"}, False, id="convolution"),
        pytest.param(ONES, KEYS_GONE, {"positions": 1.0}, False, id="one position"),
        pytest.param(ONES[:5], KEYS_GONE[:5], {"d_out": 5}, False, id="no three parts"),
    ],
)
def test_keys_in_a_packed_weight(expand: list[float], reduce: list[float], changes: dict[str, Any], told: bool) -> None:
    found = findings(packed(expand, reduce, **changes))
    assert ("CS101" in found) == told
    if told:
        assert "middle third of the rows (2 to 3 of 6, the keys" in found["CS101"].evidence
        assert "K-FAC-expand" in found["CS101"].remedy


@pytest.mark.parametrize("note", ["dropout is off", "dropout is off."])
def test_eval_mode_is_said_once(note: str) -> None:
    row = findings(layer(0.1, 0.1), dataclasses.replace(MODEL, mode_note=note))["CS302"]
    assert row.evidence == "Everything is computed in eval mode: dropout is off."


@pytest.mark.parametrize(("stderr", "trace", "severity"), [(0.01, 2.6, "warning"), (0.2, 2.1, "info")])
def test_an_error_bar_that_reaches_the_threshold_leaves_it_undecided(
    stderr: float, trace: float, severity: str
) -> None:
    found = layer(0.7, 1.4, (trace, 1.0))
    bars = {"rel_frobenius_stderr": stderr, "trace_ratio_stderr": stderr, "status": "estimated"}
    found.errors = {name: dataclasses.replace(row, **bars) for name, row in found.errors.items()}
    optimizer = dataclasses.replace(MODEL, optimizer="K-FAC")
    rows = findings(found, optimizer)
    assert rows["CS102"].severity == severity
    undecided = severity == "info"
    assert ("undecided" in rows["CS102"].evidence) == ("undecided" in rows["CS104"].evidence) == undecided
    # 0.7 against 1.4: clear with small bars only
    found.errors = {
        name: dataclasses.replace(row, rel_frobenius_stderr=4 * stderr) for name, row in found.errors.items()
    }
    assert findings(found, optimizer)["CS102"].remedy.startswith("Use K-FAC-expand") != undecided


BESIDE = 1e-6


def far_off(**errors: float) -> Layer:
    """A layer of which K-FAC-expand is the closer flavour, 0.8 off, with other approximations' errors."""
    found = layer(0.8, 0.9)
    found.errors |= {name: ErrorRow("a", name, "exact", rel_frobenius=error) for name, error in errors.items()}
    return found


@pytest.mark.parametrize(("error", "code"), [(0.5 + BESIDE, "CS102"), (0.5, "")])
def test_large_errors(error: float, code: str) -> None:
    assert set(findings(layer(error, error))) == ({code} if code else set())


@pytest.mark.parametrize(("larger", "told"), [(0.45 * (1 + BESIDE), True), (0.45, False)])
def test_flavours_that_differ(larger: float, told: bool) -> None:
    assert ("CS103" in findings(layer(0.3, larger))) == told


@pytest.mark.parametrize(("larger", "told"), [(0.1 + BESIDE, True), (0.1, False)])
def test_flavours_that_are_both_close_need_no_choice(larger: float, told: bool) -> None:
    assert ("CS103" in findings(layer(0.05, larger))) == told


@pytest.mark.parametrize("side", [1.0, -1.0])
@pytest.mark.parametrize("beside", [BESIDE, -BESIDE])
def test_a_trace_that_is_off(side: float, beside: float) -> None:
    ratio = (2.0 * (1 + beside)) ** side
    assert ("CS104" in findings(layer(0.3, 0.3, (ratio, ratio)))) == (beside > 0)


@pytest.mark.parametrize(("ratio", "told"), [(1e-6 * (1 - BESIDE), True), (1e-6 * (1 + BESIDE), False)])
def test_reduce_is_blind(ratio: float, told: bool) -> None:
    assert ("CS101" in findings(layer(0.3, 1.0, (1.0, ratio)))) == told


@pytest.mark.parametrize(("share", "told"), [(6, True), (5, False)])
def test_uncovered_parameters(share: int, told: bool) -> None:
    rows = [CoverageRow("w", "a", 100 - share, "kronecker"), CoverageRow("v", "", share, "uncovered", "computed")]
    assert ("CS301" in {row.code for row in find(MODEL, {}, rows)}) == told


@pytest.mark.parametrize(("nearest", "limited"), [(0.64 * (1 + BESIDE), True), (0.64, False), (float("nan"), False)])
def test_what_no_choice_of_factors_takes_away(nearest: float, limited: bool) -> None:
    row = findings(far_off(kron_best=nearest))["CS102"]
    assert ("even the nearest single Kronecker product is off by 0.64" in row.evidence) == limited
    assert ("nearest single Kronecker product is off by 0.64" in row.evidence) == (nearest == nearest)
    assert ("No other choice of two factors helps" in row.remedy) == limited
    assert "on larger batches" not in row.remedy


@pytest.mark.parametrize(("error", "helped"), [(0.4 * (1 - BESIDE), True), (0.4, False), (0.79, False)])
def test_ekfac_is_the_remedy_where_it_halves_the_error(error: float, helped: bool) -> None:
    remedy = findings(far_off(ekfac_expand=error))["CS102"].remedy
    assert ("correct the eigenvalues before anything else" in remedy) == helped
    assert f"EKFAC in the same basis is off by {error:.2f}" in remedy
    assert ("hardly better" in remedy) == (error > 0.64)


@pytest.mark.parametrize(
    ("source", "evidence", "remedy"),
    [
        ("spread", "deviation from their mean", ""),
        ("mean", "the inputs' mean", "Centre its inputs"),
        ("cross", "positions of an example adding up", "reduce is no closer"),
    ],
)
@pytest.mark.parametrize("share", [0.5, 0.5 - BESIDE])
def test_the_remedy_follows_the_source_of_the_error(source: str, evidence: str, remedy: str, share: float) -> None:
    found = far_off()
    shares = {"spread": (1 - share) / 2, "mean": (1 - share) / 2, "cross": (1 - share) / 2, source: share}
    found.sources = {"kfac_expand": SourceRow("a", "kfac_expand", 0.8, **shares)}
    row = findings(found)["CS102"]
    assert (
        f"50% of expand's error comes from {'curvature that depends on ' if not remedy else ''}" in row.evidence
    ) == (share >= 0.5)
    assert (evidence in row.evidence) == (share >= 0.5)
    assert not remedy or (remedy in row.remedy) == (share >= 0.5)


def test_one_position_has_one_flavour() -> None:
    row = findings(layer(0.8, 0.8, positions=1.0))["CS102"]
    assert row.evidence == "K-FAC is not close to the exact block: relative error 0.80."
    assert "flavour" not in row.remedy
