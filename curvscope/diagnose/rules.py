"""Which layers deserve a look, and why: from the records alone.

Codes: CS1xx speak of how well a Kronecker product can describe a layer, CS2xx of the block itself, CS3xx of what the
report does not cover, CS4xx of damping, CS5xx of stability.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from curvscope.diagnose import damping, large_errors
from curvscope.diagnose.causes import ordered
from curvscope.diagnose.large_errors import LARGE_ERROR, bar, clearly_better
from curvscope.diagnose.signs import sign_findings
from curvscope.diagnose.stability import stability_findings
from curvscope.diagnose.thresholds import SHIPPED, Thresholds
from curvscope.diagnose.titles import Found, finding
from curvscope.records import (
    CoverageRow,
    ExampleRow,
    FindingRow,
    GlobalDampingRow,
    Layer,
    ModelInfo,
    StabilityRow,
)

TRACE_OFF = 2.0
UNCOVERED_SHARE = 0.05
BLIND_TRACE = 1e-6
KEY_SHARE = 1e-3
KRONECKER_OPTIMIZERS = ("K-FAC", "Shampoo")


def find(
    model: ModelInfo,
    layers: Mapping[str, Layer],
    coverage: Sequence[CoverageRow],
    stability: Sequence[StabilityRow] = (),
    examples: Sequence[ExampleRow] = (),
    limits: Thresholds = SHIPPED,
    joint: Sequence[GlobalDampingRow] = (),
) -> list[FindingRow]:
    """The findings, likely root causes first and what they cause behind them (`causes.ordered`)."""
    ranked: list[tuple[int, float, FindingRow]] = []
    for layer in layers.values():
        ranked += _of_layer(layer)
        ranked += damping.of_layer(layer, model.learning_rate, joint, limits)
    ranked += damping.of_network(layers, joint)
    ranked += damping.together(layers, joint, ranked, model.learning_rate, limits)
    ranked += _of_network(model, coverage)
    ranked += stability_findings(model, stability)
    made = [Found(_for_optimizer(row, model), size) for _, size, row in ranked if _concerns(row, model)]
    return ordered([*made, *sign_findings(stability, examples, limits)], stability, limits)


def _for_optimizer(row: FindingRow, model: ModelInfo) -> FindingRow:
    """How well a Kronecker product fits is no concern of an optimizer that uses none; of one not known it may be."""
    if row.code.startswith("CS1") and row.severity == "warning" and not _kronecker(model):
        return dataclasses.replace(row, severity="info")
    return row


def _concerns(row: FindingRow, model: ModelInfo) -> bool:
    """K-FAC's damping is nothing to those who have none; Shampoo's is in other units."""
    return not row.code.startswith("CS4") or model.optimizer.partition(",")[0] in ("", "K-FAC")


def _kronecker(model: ModelInfo) -> bool:
    """Whether the optimizer uses Kronecker factors, for all that is known."""
    return model.optimizer.partition(",")[0] in ("", *KRONECKER_OPTIMIZERS)


def _of_layer(layer: Layer) -> list[tuple[int, float, FindingRow]]:
    """At most one finding a layer and rule: severity rank (1 warning, 2 info), size of the effect, the row."""
    found: list[tuple[int, float, FindingRow]] = []
    errors, name = layer.errors, layer.name
    expand, reduce = errors.get("kfac_expand"), errors.get("kfac_reduce")
    if expand is None or reduce is None:
        return found
    if expand.status == "not_assessed" and "zero" in expand.reason:
        row = finding(
            "CS201",
            "warning",
            name,
            "The exact GGN block is zero on this batch: no curvature reaches the layer.",
            "Look for dead units or a saturated loss behind it; damping alone decides its K-FAC step.",
        )
        return [(1, 3.0, row)]
    if math.isnan(expand.rel_frobenius) or math.isnan(reduce.rel_frobenius):
        return found
    blind = layer.row.positions > 1 and reduce.trace_ratio < BLIND_TRACE
    if blind:
        row = finding(
            "CS101",
            "warning",
            name,
            f"K-FAC-reduce is blind here: its B vanishes (trace ratio {reduce.trace_ratio:.1e}), although tr G = "
            f"{_trace(layer)}; the output gradients of an example's positions cancel, as they do for the keys of "
            "softmax attention.",
            "Use K-FAC-expand for this layer; under reduce its step is the gradient divided by the damping.",
        )
        found.append((1, 2.0, row))
    elif packed := _packed_keys(layer):
        found.append((1, 1.9, packed))
    best = min(expand.rel_frobenius, reduce.rel_frobenius)
    large = large_errors.of_layer(layer, blind=blind)
    if large is not None:
        found.append((1, *large))
    if not blind and layer.row.positions > 1 and not (best > LARGE_ERROR):
        low, high = sorted((expand.rel_frobenius, reduce.rel_frobenius))
        better = clearly_better(expand, reduce)
        if better and high > 0.1:
            row = finding(
                "CS103",
                "info",
                name,
                f"The flavours differ: relative errors {expand.rel_frobenius:.2f} (expand), "
                f"{reduce.rel_frobenius:.2f} (reduce).",
                f"Use K-FAC-{better} for this layer.",
            )
            found.append((2, high - low, row))
    chosen = expand if expand.rel_frobenius <= reduce.rel_frobenius else reduce
    ratio = chosen.trace_ratio
    both = layer.row.better_flavour == "undecided"  # then it must be true of either
    if (
        not blind
        and _trace_off(ratio)
        and (not both or _trace_off(reduce.trace_ratio) == _trace_off(expand.trace_ratio))
    ):
        direction = "over" if ratio > 1 else "under"
        times = _times(max(ratio, 1 / ratio))
        room = bar(chosen.trace_ratio_stderr)
        near = ratio - room <= TRACE_OFF if ratio > 1 else ratio + room >= 1 / TRACE_OFF
        doubt = f"; undecided, as the error bar of {room:.2g} reaches the threshold" if near else ""
        row = finding(
            "CS104",
            "info",
            name,
            f"{'Either' if both else 'Its better'} K-FAC {direction}states the curvature {times} (tr M / tr G = "
            f"{ratio:.2g}{doubt}).",
            f"Steps here are {times} too "
            + ("short" if ratio > 1 else "long")
            + " where damping does not decide: scale the factors"
            + (", or use EKFAC (trace ratio 1)." if not _roles(layer) else "."),
        )
        found.append((2, abs(math.log(ratio)) / 10, row))
    return found


def _trace_off(ratio: float) -> int:
    """1 where a trace ratio is too large, -1 where it is too small, else 0."""
    return int(ratio > TRACE_OFF) - int(0 < ratio < 1 / TRACE_OFF)


def _roles(layer: Layer) -> bool:
    """Whether its weight is used in several roles, so that there is no EKFAC."""
    return any(factors.role for factors in layer.factors.values())


def _times(factor: float) -> str:
    """A factor in words that claim no more than they know."""
    return f"about {factor:.1f} times" if factor < 9.5 else f"about {float(f'{factor:.1e}'):,.0f} times"


def _packed_keys(layer: Layer) -> FindingRow | None:
    """Reduce-blindness on the keys of a weight that holds queries, keys and values: the middle third of its rows.

    Softmax ignores a shift of the keys, so that their output gradients sum to zero over the positions.
    """
    size, rest = divmod(layer.row.d_out, 3)
    if layer.row.kind != "linear" or layer.row.groups > 1 or rest or layer.row.positions <= 1:
        return None
    if not {"expand", "reduce"} <= set(layer.factors):
        return None
    diagonals = [np.diagonal(layer.factors[flavour].B).astype(np.float64) for flavour in ("expand", "reduce")]
    if any(diagonal.shape != (layer.row.d_out,) for diagonal in diagonals):
        return None
    expand, reduce = (diagonal.reshape(3, size).sum(axis=1) for diagonal in diagonals)
    if not (expand[1] > KEY_SHARE * expand.sum() and reduce[1] < BLIND_TRACE * expand[1]):
        return None
    if min(reduce[0], reduce[2]) < BLIND_TRACE * expand[1]:
        return None
    return finding(
        "CS101",
        "warning",
        layer.name,
        f"K-FAC-reduce is blind to the middle third of the rows ({size} to {2 * size - 1} of {layer.row.d_out}, the "
        f"keys where queries, keys and values share one weight): its B vanishes there (trace {reduce[1]:.1e}; expand's "
        f"is {expand[1]:.1e}), because softmax ignores a shift of the keys.",
        "Treat these rows as a layer of their own, with K-FAC-expand; under reduce their step is the gradient divided "
        "by the damping.",
    )


def _trace(layer: Layer) -> str:
    ggn = layer.spectra.get("ggn")
    if ggn is None:
        return "not assessed"
    return f"{ggn.trace:.2g}" + ("" if math.isnan(ggn.trace_stderr) else f" +/- {ggn.trace_stderr:.1g}")


def _of_network(model: ModelInfo, coverage: Sequence[CoverageRow]) -> list[tuple[int, float, FindingRow]]:
    found: list[tuple[int, float, FindingRow]] = []
    uncovered = [row for row in coverage if row.treatment == "uncovered" and "left out by" not in row.reason]
    share = sum(row.count for row in uncovered) / max(1, sum(r.count for r in coverage if r.treatment != "frozen"))
    if share > UNCOVERED_SHARE:
        largest = max(uncovered, key=lambda row: row.count)
        row = finding(
            "CS301",
            "info",
            "",
            f"{share:.0%} of the trainable parameters have no Kronecker factors; the largest is {largest.parameter} "
            f"({largest.count}: {largest.reason}).",
            "What the report says holds for the covered layers; K-FAC leaves the others to another optimizer.",
        )
        found.append((2, share, row))
    if model.mode_note:
        row = finding(
            "CS302",
            "info",
            "",
            f"Everything is computed in eval mode: {model.mode_note.rstrip('.')}.",
            "Curvature in training mode differs where batch statistics or dropout act; the numbers are evaluation's.",
        )
        found.append((2, 0.01, row))
    return found
