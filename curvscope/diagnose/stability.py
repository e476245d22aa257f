"""What the stability table says of the run: unstable, near the threshold, led over it by its schedule, not assessed.

CS501 is an error from twice the threshold, otherwise a warning: full-batch training hovers just above its threshold
for long stretches without diverging (arXiv:2103.00065).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from curvscope.diagnose.titles import finding
from curvscope.records import FindingRow, ModelInfo, StabilityRow

FAR_ABOVE = 2.0
NEAR = 0.8
# A layer is named where it holds at least this much of the top direction's energy, or is above on its own.
BLAME_SHARE = 0.5


def stability_findings(model: ModelInfo, rows: Sequence[StabilityRow]) -> list[tuple[int, float, FindingRow]]:
    """Severity rank (0 error, 1 warning, 2 info), size of the effect, the row: at most one for now, one for later."""
    network = {row.quantity: row for row in rows if row.scope == "network"}
    sharpness = network.get("preconditioned_sharpness")
    if sharpness is None:
        return []
    if sharpness.verdict == "not_assessed":
        row = finding(
            "CS503",
            "info",
            "",
            f"Whether training is stable was not assessed: {sharpness.reason}.",
            _what_is_missing(sharpness.reason),
        )
        return [(2, 0.5, row)]
    if sharpness.status == "not_converged" and sharpness.verdict != "above":
        row = finding(
            "CS503",
            "info",
            "",
            f"Whether training is stable was not assessed: the sharpness is {sharpness.value:.3g} at least, against a "
            f"threshold of {sharpness.threshold:.3g} ({sharpness.reason}).",
            "Give it more time (--time), or analyze fewer examples.",
        )
        return [(2, 0.5, row)]
    if sharpness.verdict == "above":
        return [_above(model, network, rows)]
    later = _scheduled(model, network)
    if sharpness.verdict == "undecided" and math.isnan(sharpness.low) and _far(sharpness):
        row = finding(
            "CS503",
            "info",
            "",
            f"Whether training is stable is undecided: the sharpness is {sharpness.value:.3g} on "
            f"{_examples(model)}, against a threshold of {sharpness.threshold:.3g}, and there are no halves of the "
            "batch to show how far it varies.",
            "Analyze more examples.",
        )
        return [(2, 0.5, row), *later]
    close = max(value for value in (sharpness.high, sharpness.value) if not math.isnan(value))
    if sharpness.verdict == "undecided" or close > NEAR * sharpness.threshold:
        return [(2, 0.8, _near(model, sharpness, network)), *later]
    return later


def _far(sharpness: StabilityRow) -> bool:
    """Whether the value alone is not near the threshold, on either side."""
    return not NEAR <= sharpness.value / sharpness.threshold <= 1 / NEAR


def _what_is_missing(reason: str) -> str:
    """What would let stability be assessed, by the reason why it was not."""
    if "no optimizer" in reason or "state" in reason or "moment" in reason:
        return (
            "Name the optimizer and its numbers (--optimizer sgd --lr 0.1; from Python optimizer=, itself or words "
            "such as 'sgd:lr=0.1'). One whose step rests on moments, such as Adam, needs its state: from the live "
            "optimizer, or from a checkpoint or capture that holds it."
        )
    if "learning rate" in reason or " lr" in reason:
        return "Give the learning rate of the next step (--lr; from Python optimizer='sgd:lr=0.1')."
    if "memory" in reason:
        return "Give it more memory (--memory), or a smaller batch."
    return "The sharpness of the Hessian in table stability stands without a verdict."


def _above(
    model: ModelInfo, network: dict[str, StabilityRow], rows: Sequence[StabilityRow]
) -> tuple[int, float, FindingRow]:
    sharpness = network["preconditioned_sharpness"]
    ratio = sharpness.value / sharpness.threshold
    layer, blame = _blamed(rows)
    growth = network.get("growth_factor")
    grows = (
        f" A step along the top direction multiplies the deviation by {growth.value:.3g}."
        if growth is not None and growth.status == "ok"
        else ""
    )
    low = sharpness.value if math.isnan(sharpness.low) else sharpness.low
    early = network.get("early_moments")
    fades = early is not None and low <= sharpness.threshold * early.value
    severity = "error" if low > FAR_ABOVE * sharpness.threshold else "warning"
    if fades and early is not None:
        severity = "info"
        grows = (
            f" That holds for this step alone ({early.reason}): P grows {early.value:.2g} times as the bias correction "
            "of the momentum fades, and the sharpness falls below the threshold with it."
        )
    after = network.get("next_sharpness")
    passes = after is not None and after.verdict == "below"
    if passes and after is not None:
        severity = "info"
        grows = (
            f" That is with the squared gradients as stored; the next step takes this batch's in first, and with them "
            f"the sharpness is {after.value:.3g}, below the threshold: weights that had hardly any gradient before (a "
            "token seen for the first time) get one now."
        )
    clip, holds = _clip(network)
    if holds and severity == "error":
        severity = "warning"
    row = finding(
        "CS501",
        severity,
        layer,
        f"{model.optimizer}: sharpness {_spread(model, sharpness)} is above the threshold "
        f"{sharpness.threshold:.3g}.{grows}{clip}{blame}",
        "Nothing to change for this; look again some steps on."
        if passes
        else " ".join(filter(None, (_rate(network), _damping(model), "On mini-batches the limit can be lower."))),
        confidence=0.4 if fades or passes else 0.6 if holds else 0.9,
    )
    return ("error", "warning", "info").index(row.severity), 10 + ratio, row


def _clip(network: dict[str, StabilityRow]) -> tuple[str, bool]:
    """What clipping makes of it, a sentence, and whether the clipped step is stable."""
    scale, row = network.get("clip_scale"), network.get("clipped_sharpness")
    if scale is None or row is None:
        return "", False
    words = (
        f" Clipping makes this step {scale.value:.2g} times as long ({scale.reason}), which puts the threshold at "
        f"{row.threshold:.3g}: "
    )
    if row.verdict == "below":
        return f"{words}below it. That {row.reason}.", True
    return words + ("above it all the same." if row.verdict == "above" else "undecided."), False


def _scheduled(model: ModelInfo, network: dict[str, StabilityRow]) -> list[tuple[int, float, FindingRow]]:
    """CS509: rates ahead that the sharpness of today does not bear; an assumed peak is no ground for it."""
    row = network.get("scheduled_peak_lr")
    if row is None or row.verdict != "above" or row.value <= 0:
        return []
    over = row.value / row.threshold
    severity = "warning" if over > FAR_ABOVE else "info"
    found = finding(
        "CS509",
        severity,
        "",
        f"{model.optimizer}: today's sharpness bears a learning rate up to {row.threshold:.2g}; the schedule goes to "
        f"{row.value:.2g} ({row.reason}).",
        f"Stop the warm-up short of {row.threshold:.2g}, lengthen it so that the sharpness can follow, or analyze a "
        "checkpoint nearer to the peak: sharpness often falls as the rate rises.",
        confidence=0.5,
    )
    return [(("error", "warning", "info").index(severity), over, found)]


def _near(model: ModelInfo, sharpness: StabilityRow, network: dict[str, StabilityRow]) -> FindingRow:
    words = f"cannot be told from the threshold {sharpness.threshold:.3g}"
    if sharpness.verdict != "undecided":
        near = sharpness.value > NEAR * sharpness.threshold
        words = f"is close below the threshold {sharpness.threshold:.3g}"
        if not near:
            words = f"is below the threshold {sharpness.threshold:.3g}, but close to it on a part of the batch"
    return finding(
        "CS502",
        "info",
        "",
        f"{model.optimizer}: sharpness {_spread(model, sharpness)} {words}.",
        "Repeat with a larger batch to decide. " + _rate(network),
        confidence=0.6,
    )


def _damping(model: ModelInfo) -> str:
    if ", damping " not in model.optimizer:
        return ""
    words = "More damping lowers the sharpness, too."
    if model.optimizer.startswith("K-FAC"):
        words += (
            " A damping that is called safe elsewhere in the report is so for one whole step (learning rate 1) from "
            "here; this is about steps at your learning rate, one after another: both can hold."
        )
    return words


def _spread(model: ModelInfo, row: StabilityRow) -> str:
    """The value on the batch with its spread, in words."""
    halves = f", {row.low:.3g} to {row.high:.3g} with its halves" if not math.isnan(row.low) else ""
    return f"{row.value:.3g} (on {_examples(model)}{halves})"


def _rate(network: dict[str, StabilityRow]) -> str:
    rates = network.get("largest_stable_lr")
    if rates is None or rates.status != "ok" or not math.isfinite(rates.value):
        return ""
    safe = rates.low if math.isfinite(rates.low) else rates.value
    parts = " and on its parts" if math.isfinite(rates.low) else ""
    if rates.threshold <= safe:
        return f"The learning rate, {rates.threshold:.2g}, is stable on this batch{parts} (up to {safe:.2g})."
    return f"A learning rate under {safe:.2g} would be stable on this batch{parts} (now {rates.threshold:.2g})."


def _blamed(rows: Sequence[StabilityRow]) -> tuple[str, str]:
    """The layer to name, empty where the direction is spread over many, and a sentence on who carries it."""
    shares = {row.layer: row.value for row in rows if row.quantity == "direction_share"}
    blocks = {row.layer: row for row in rows if row.scope == "layer" and row.quantity == "preconditioned_sharpness"}
    if not shares:
        return "", ""
    alone = [name for name, row in blocks.items() if row.verdict == "above"]
    first = max(alone or shares, key=lambda name: shares[name])
    said = f" {first} carries {shares[first]:.0%} of the top direction"
    if first in alone:
        block = blocks[first]
        return first, f"{said}, and its own block is above the threshold ({block.value:.3g})."
    return (first if shares[first] >= BLAME_SHARE else ""), f"{said}."


def _examples(model: ModelInfo) -> str:
    return f"{model.examples} example{'' if model.examples == 1 else 's'}"
