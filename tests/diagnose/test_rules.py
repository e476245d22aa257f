from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from curvscope.diagnose.rules import find
from curvscope.records import ErrorRow, FindingRow, KroneckerFactors, Layer, LayerRow, ModelInfo

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
