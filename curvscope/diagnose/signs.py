"""Findings from the signs beside sharpness: inputs, units, weights, attention, outputs, moments, settings.

A sign above its threshold makes a finding. Most are "info" on their own: a network can live with them. They become as
severe as the worst of what they cause (`diagnose.causes`). Those that spoil training by themselves are warnings, and so
are weights, inputs, examples and learning rates far over their thresholds (`diagnose.thresholds`; docs/zoo.md).

The confidence grows with the distance from the threshold: 0.5 at it, 0.2 more for every factor of 2, at most 0.95.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from curvscope.diagnose.thresholds import SHIPPED, Thresholds
from curvscope.diagnose.titles import Found, found
from curvscope.records import ExampleRow, StabilityRow

Rows = dict[str, list[StabilityRow]]


def sign_findings(
    table: Sequence[StabilityRow], examples: Sequence[ExampleRow] = (), limits: Thresholds = SHIPPED
) -> list[Found]:
    """At most one finding a code and layer."""
    rows: Rows = {}
    for row in limits.judged(table):
        rows.setdefault(row.quantity, []).append(row)
    plain = (_saturated_units, _dead_inputs, _mean, _condition, _positions, _attention, _norms, _moments, _betas)
    scaled = (_dead_units, _recurrent, _weights, _inputs, _learning_rates, _outputs, _eps, _step)
    result = [one for rule in plain for one in rule(rows)]
    result += [one for limited in scaled for one in limited(rows, limits)]
    return result + _examples(rows, examples, limits)


def confidence(value: float, threshold: float) -> float:
    """0.5 at the threshold, 0.2 more for every factor of 2 beyond it, at most 0.95."""
    if not value > 0 or not threshold > 0 or math.isinf(value):
        return 0.95
    return round(min(0.95, max(0.5, 0.5 + 0.2 * math.log2(value / threshold))), 2)


def _above(rows: Rows, quantity: str, *, network: bool = False) -> list[StabilityRow]:
    return [row for row in rows.get(quantity, []) if row.verdict == "above" and (row.scope == "network") == network]


def _value(rows: Rows, quantity: str, layer: str = "") -> float:
    return next((row.value for row in rows.get(quantity, []) if row.layer == layer), math.nan)


def _simple(
    rows: Rows,
    quantity: str,
    code: str,
    words: Callable[[StabilityRow], tuple[str, str]],
    severity: Callable[[StabilityRow], str] = lambda row: "info",
) -> list[Found]:
    result = []
    for row in _above(rows, quantity):
        sure = confidence(row.value, row.threshold)
        result.append(found(code, severity(row), row.layer, *words(row), size=row.value, confidence=sure))
    return result


def _severity(row: StabilityRow, limits: Thresholds) -> str:
    return "warning" if row.value >= limits.far * row.threshold else "info"


def _over(rows: Rows) -> bool:
    """Whether the sharpness on the whole batch is above its threshold, though halves of the batch may disagree."""
    row = next((one for one in rows.get("preconditioned_sharpness", []) if one.scope == "network"), None)
    return row is not None and row.status == "ok" and row.value > row.threshold


def _dead_units(rows: Rows, limits: Thresholds) -> list[Found]:
    result = []
    for row in _above(rows, "dead_units"):
        evidence = (
            f"{row.value:.0%} of its units are zero at every example and position (threshold {row.threshold:.0%})."
        )
        remedy = (
            "Raise the layer's biases or start it anew: no gradient brings a dead ReLU back. Then look at the "
            "learning rate that may have killed them."
        )
        severity = "warning" if row.value >= limits.dead else "info"
        sure = 0.95 if row.value >= limits.dead else confidence(row.value, row.threshold)
        result.append(found("CS202", severity, row.layer, evidence, remedy, size=row.value, confidence=sure))
    return result


def _saturated_units(rows: Rows) -> list[Found]:
    return _simple(
        rows,
        "saturated_units",
        "CS203",
        lambda row: (
            f"{row.value:.0%} of the values of its {row.reason} units lie in the flat parts, where the slope is "
            f"under a twentieth of the steepest (threshold {row.threshold:.0%}).",
            "Make its weights or its inputs smaller, or normalise what goes in.",
        ),
        lambda row: "warning",
    )


def _dead_inputs(rows: Rows) -> list[Found]:
    return _simple(
        rows,
        "dead_inputs",
        "CS204",
        lambda row: (
            f"{row.value:.0%} of its inputs are zero at every row of this batch (threshold {row.threshold:.0%}).",
            "Constant pixels and padding do that, too; otherwise look for dead units in the layer before.",
        ),
    )


def _mean(rows: Rows) -> list[Found]:
    return _simple(
        rows,
        "mean_share",
        "CS205",
        lambda row: (
            f"The mean holds {row.value:.1%} of the energy of its inputs (threshold {row.threshold:.0%}): they "
            f"hardly differ between examples.",
            "Subtract the mean (normalise the inputs, or put a norm in front); it gives the layer one large "
            "eigenvalue.",
        ),
    )


def _condition(rows: Rows) -> list[Found]:
    result: list[Found] = []
    for which in ("A", "B"):
        for row in _above(rows, f"unresolved_{which}"):
            evidence = f"K-FAC's {which} can't be inverted without damping: to float32 {row.reason}."
            if not any(one.row.layer == row.layer for one in result):
                remedy = "Damping alone decides the step in the lost directions."
                result.append(found("CS206", "info", row.layer, evidence, remedy, size=0.0))
    return result


def _positions(rows: Rows) -> list[Found]:
    return [
        found(
            "CS208",
            "info",
            row.layer,
            f"{row.reason} holds {row.value:.0%}{_interval(row)} of the curvature that reaches its outputs "
            f"(threshold {row.threshold:.0%}).",
            "One position decides the layer's step: look at what reads it (attention to a token, a head of one "
            "pixel), or pool over more.",
            size=row.value,
            confidence=confidence(row.value, row.threshold),
        )
        for row in _above(rows, "position_share")
        if row.value < 1.0  # a pooled token is all there is
    ]


def _interval(row: StabilityRow) -> str:
    """The 95 % interval of a share from draws."""
    return "" if math.isnan(row.value_stderr) else f" ({row.low:.0%} to {row.high:.0%})"


def _attention(rows: Rows) -> list[Found]:
    result = []
    for row in _above(rows, "attention_collapse"):
        logit = next((one for one in _above(rows, "attention_logit") if one.layer == row.layer), None)
        if logit is None:
            continue
        evidence = (
            f"Attention looks at one key: its entropy is {1 - row.value:.2g} of that of even weights (threshold "
            f"{1 - row.threshold:.2g}), with logits up to {logit.value:.3g} (threshold {logit.threshold:g})."
        )
        remedy = "Normalise queries and keys (QK-norm), or make their weights smaller; lower their learning rate."
        sure = confidence(logit.value, logit.threshold)
        result.append(found("CS209", "warning", row.layer, evidence, remedy, size=logit.value, confidence=sure))
    return result


def _outputs(rows: Rows, limits: Thresholds) -> list[Found]:
    gap = next((row for row in rows.get("logit_gap", []) if not math.isnan(row.value)), None)
    wrong = next((row for row in rows.get("wrong_and_certain", []) if not math.isnan(row.value)), None)
    if gap is None or wrong is None or gap.verdict != "above":
        return []
    harmful = wrong.value > 0 or gap.value > limits.far * gap.threshold
    evidence = (
        f"The outputs are certain: the median gap between the two largest logits is {gap.value:.3g} ({gap.reason}; "
        f"above {gap.threshold:.3g} float32 rounds p to 1)"
    )
    if wrong.value > 0:
        evidence += f", and {wrong.value:.0%} of the terms are certain of a wrong class ({wrong.reason})"
    evidence += "."
    factor = gap.threshold / gap.value
    remedy = f"Scale the last layer's weights by {factor:.2g} or less, or train with label smoothing or weight decay."
    sure = confidence(gap.value, gap.threshold)
    return [
        found("CS210", "warning" if harmful else "info", gap.layer, evidence, remedy, size=gap.value, confidence=sure)
    ]


def _weights(rows: Rows, limits: Thresholds) -> list[Found]:
    scales = {row.layer: row for row in rows.get("weight_scale", [])}
    result = []
    for layer, row in scales.items():
        others = [one.value for name, one in scales.items() if name != layer]
        middle = statistics.median(others) if others else math.nan
        if row.verdict != "above" or row.value < limits.out_of_step * middle:
            continue
        against = f", {row.value / middle:.1f} times the median of the other layers" if others else ""
        evidence = (
            f"The rows of its weight have norm {row.value:.3g} (RMS){against}; the threshold is {row.threshold:g}, "
            f"and He's initialisation has 1.41."
        )
        goal = middle if others else 1.41
        remedy = f"Scale the weight by {goal / row.value:.2g}, or initialise it anew; lower its learning rate."
        sure = confidence(row.value, row.threshold)
        severity = _severity(row, limits)
        result.append(found("CS211", severity, layer, evidence, remedy, size=row.value, confidence=sure))
    return result


def _recurrent(rows: Rows, limits: Thresholds) -> list[Found]:
    return _simple(
        rows,
        "recurrent_radius",
        "CS212",
        lambda row: (
            f"Its largest eigenvalue is {row.value:.3g} in modulus (threshold {row.threshold:g}): over T steps a "
            f"signal grows up to {row.value:.2g}^T times, until units saturate.",
            f"Scale the weight by {1 / row.value:.2g} (or initialise it orthogonally), and clip gradients.",
        ),
        lambda row: "warning" if row.value > limits.explodes else "info",
    )


def _inputs(rows: Rows, limits: Thresholds) -> list[Found]:
    return _simple(
        rows,
        "input_scale",
        "CS213",
        lambda row: (
            f"It reads inputs of RMS {row.value:.3g} (threshold {row.threshold:g}), {_mean_words(rows, row.layer)}.",
            "Subtract the mean of the training data and divide by its standard deviation: curvature here goes with "
            f"the square of the inputs, about {row.value**2:,.3g} times that of inputs of RMS 1.",
        ),
        lambda row: _severity(row, limits),
    )


def _mean_words(rows: Rows, layer: str) -> str:
    share = _value(rows, "mean_share", layer)
    return "their mean not assessed" if math.isnan(share) else f"of whose energy the mean holds {share:.0%}"


def _norms(rows: Rows) -> list[Found]:
    row = next((one for one in rows.get("normalisations", []) if one.value == 0), None)
    drift = next((one for one in rows.get("signal_drift", []) if not math.isnan(one.value)), None)
    if row is None:
        return []
    strong = drift is not None and drift.verdict == "above"
    change = f"; signals change {drift.reason.partition(',')[0]}" if drift is not None else ""
    evidence = f"The network has no normalisation ({row.reason}){change}."
    remedy = "Put LayerNorm or BatchNorm before (or after) every block, or scale the initialisation to the depth."
    sure = confidence(drift.value, drift.threshold) if strong and drift is not None else 0.4
    return [found("CS215", "warning" if strong else "info", "", evidence, remedy, size=0.0, confidence=sure)]


def _learning_rates(rows: Rows, limits: Thresholds) -> list[Found]:
    over = _over(rows)
    return _simple(
        rows,
        "learning_rate_ratio",
        "CS504",
        lambda row: (
            f"Its learning rate is {row.value:.3g} times the median of all layers' ({row.reason}).",
            f"Divide it by {row.value:.3g}, unless that is meant.",
        ),
        lambda row: "warning" if over else _severity(row, limits),
    )


def _moments(rows: Rows) -> list[Found]:
    row = next(iter(_above(rows, "update_rms", network=True)), None)
    if row is None:
        return []
    worst = max(_above(rows, "update_rms"), key=lambda one: one.value, default=None)
    where = f"; most of all in {worst.layer} ({worst.value:.3g})" if worst is not None else ""
    spread = f" ({row.low:.3g} to {row.high:.3g} with halves of the batch)" if not math.isnan(row.low) else ""
    evidence = (
        f"The gradient is far larger than what the second moments expect: RMS of g / sqrt(v) is "
        f"{row.value:.3g}{spread}, threshold {row.threshold:g}{where}."
    )
    remedy = (
        f"Divide the learning rate by {row.value:.2g} until v has caught up (update clipping, StableAdamW), or "
        f"lower beta2; if the data changed, start the moments anew with a warm-up."
    )
    sure = confidence(row.value, row.threshold)
    return [found("CS505", "warning", "", evidence, remedy, size=row.value, confidence=sure)]


def _eps(rows: Rows, limits: Thresholds) -> list[Found]:
    row = next(iter(_above(rows, "eps_share", network=True)), None)
    if row is None:
        return []
    evidence = (
        f"In {row.value:.0%} of the entries eps is larger than sqrt(v) (threshold {row.threshold:.0%}): the "
        f"optimizer takes plain gradient steps of length lr / eps there."
    )
    remedy = "Lower eps (1e-8 is the default), or raise the learning rate to match lr / eps."
    sure = confidence(row.value, row.threshold) if row.value < 0.9 else 0.95
    return [found("CS506", "warning", "", evidence, remedy, size=row.value, confidence=sure)]


def _betas(rows: Rows) -> list[Found]:
    row = next(iter(_above(rows, "beta1_over_root_beta2", network=True)), None)
    if row is None:
        return []
    evidence = (
        f"beta1 is {row.value:.3g} times sqrt(beta2): the step remembers gradients for longer than it remembers "
        f"their size, and Adam's convergence needs beta1 < sqrt(beta2)."
    )
    remedy = "Raise beta2 (0.999, or 0.95 for large batches), or lower beta1."
    return [found("CS507", "warning", "", evidence, remedy, size=row.value, confidence=0.9)]


def _as_long(ratio: float) -> str:
    words = f"{ratio:.2g}"
    return "as long" if words == "1" else f"{words} times as long"


def _step(rows: Rows, limits: Thresholds) -> list[Found]:
    row = next(iter(_above(rows, "update_ratio", network=True)), None)
    if row is None:
        return []
    evidence = f"The next step is {_as_long(row.value)} as the weights themselves (threshold {row.threshold:g})."
    worst = max(_above(rows, "update_ratio"), key=lambda one: one.value, default=None)
    if worst is not None and worst.value > row.value:
        evidence = evidence[:-1] + f"; in {worst.layer} {_as_long(worst.value)}."
    bears = any(one.scope == "network" and one.verdict == "below" for one in rows.get("preconditioned_sharpness", []))
    if bears:
        evidence += " The sharpness bears this rate here: it is trouble if the loss is not quadratic that far."
    remedy = f"Divide the learning rate by {row.value / 0.01:.2g} for a step of 1 %, or warm it up."
    severity = "warning" if row.value > limits.large_step else "info"
    sure = confidence(row.value, row.threshold) if not bears else 0.5
    return [found("CS508", severity, "", evidence, remedy, size=row.value, confidence=sure)]


def _examples(rows: Rows, examples: Sequence[ExampleRow], limits: Thresholds) -> list[Found]:
    """CS214 of an example whose inputs are out of scale, CS207 of one that carries the network's top direction."""
    result = []
    network = [row for row in examples if not row.layer]
    for row in _above(rows, "odd_example", network=True):
        place = int(row.reason.split()[1])
        own = next((one for one in network if one.example == place), None)
        carried = [] if own is None else [f"{own.curvature_share:.0%} of the curvature along the top direction"]
        shares = [own.curvature_share] if own is not None else []
        if own is not None and not math.isnan(own.gradient_share):
            carried.append(f"{own.gradient_share:.0%} of the squared gradients")
            shares.append(own.gradient_share)
        evidence = f"Example {place} is {row.value:.3g} times as large as the median one (threshold {row.threshold:g})"
        evidence += f"; it carries {' and '.join(carried)}." if carried else "."
        harmful = any(share > limits.carries for share in shares) or _over(rows)
        severity = "warning" if harmful else _severity(row, limits)
        remedy = f"Look at example {place} of the batch: scale, corruption, label. Leave such examples out, or clip."
        sure = confidence(row.value, row.threshold)
        result.append(found("CS214", severity, "", evidence, remedy, size=row.value, confidence=sure))
    for row in _above(rows, "example_share", network=True):
        first = network[0] if network else None
        gradient = (
            f", and {first.gradient_share:.0%} of the squared gradients"
            if first is not None and not math.isnan(first.gradient_share)
            else ""
        )
        evidence = f"{row.reason[:1].upper()}{row.reason[1:]} carries the top direction's curvature{gradient}."
        remedy = "Look at it: label, scale, duplicates. Late in training a few hard examples carry it in any network."
        sure = confidence(row.value, row.threshold)
        result.append(found("CS207", "info", "", evidence, remedy, size=row.value, confidence=sure))
    return result
