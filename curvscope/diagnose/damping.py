"""Findings about damping (CS4xx), from tables/ranges and tables/damping alone.

They speak of the better K-FAC. Which form of damping the optimizer uses is not known, so that too small and too large
are said only where every form that could be assessed says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from curvscope.diagnose.thresholds import SHIPPED, Thresholds
from curvscope.diagnose.titles import finding
from curvscope.records import DampingRow, FindingRow, GlobalDampingRow, Layer, RangeRow, leading

# Recommended values of the layers this far apart: one global value serves none of them well.
SPREAD = 100.0
FORM_GAP = 0.25

Ranked = tuple[int, float, FindingRow]


def of_layer(
    layer: Layer,
    learning_rate: float = math.nan,
    joint: Sequence[GlobalDampingRow] = (),
    limits: Thresholds = SHIPPED,
) -> list[Ranked]:
    """At most one finding a code: severity rank (1 warning, 2 info), size of the effect, the row."""
    name = f"kfac_{'reduce' if layer.row.better_flavour == 'reduce' else 'expand'}"
    forms = [row for row in layer.ranges if row.approximation == name and row.status == "ok"]
    if not forms:
        return []
    found: list[Ranked] = []
    standings = {row.standing for row in forms}
    first = forms[0]
    whole = leading(joint)
    to_set = _to_set(layer, whole)
    if standings == {"too_small"}:
        short = _short(layer, name, learning_rate, limits.trusted)
        size = 0.5 + min(0.4, math.log10(max(1.0, first.low / first.current)) / 20)
        row = _too_small(layer, forms, whole, to_set, learning_rate if short else math.nan)
        found.append((2 if short else 1, size, row))
    elif standings == {"too_large"} and first.gain > limits.lost and not to_set >= first.current:
        row = finding(
            "CS402",
            "warning",
            layer.name,
            f"With damping {first.current:.2g} {_words(name)} has become gradient descent with rate 1 / damping (from "
            f"{first.high:.2g} on so): its step reaches {1 - first.gain:.0%} of the decrease that damping "
            f"{first.recommended:.2g} gives in the exact quadratic model.",
            f"Lower the damping of this layer towards {first.recommended:.2g}, the best if only this layer moves."
            if math.isnan(to_set)
            else f"Lower the damping of this layer towards {to_set:.2g}, {_others(first, whole)}.",
        )
        found.append((1, 0.3 * min(1.0, first.gain), row))
    if first.form_gap > FORM_GAP:
        place = first.recommended if math.isnan(first.current) else first.current
        row = finding(
            "CS404",
            "info",
            layer.name,
            f"How damping is added to {_words(name)} matters here, as M + damping or split between the factors: at "
            f"{place:.2g} {_gap(first.form_gap)}. The best values are {_recommended(forms)}.",
            "Do not carry a damping over from one form to the other: tune each by its own safe range.",
        )
        found.append((2, min(1.0, first.form_gap) / 4, row))
    return found


def _short(layer: Layer, name: str, learning_rate: float, trusted: float) -> bool:
    """Whether the learning rate takes so little of the step, in every form, that what it does take can be trusted.

    At eta times the step the exact quadratic model loses eta s - eta^2 b / 2, K-FAC's promises at most eta s, and
    alpha_star <= s / b: their ratio is at least `trusted` wherever eta <= 2 (1 - trusted) alpha_star.
    """
    best = [row.alpha_star for row in layer.damping if row.approximation == name and "current" in row.mark]
    return bool(best) and all(learning_rate <= 2 * (1 - trusted) * multiple for multiple in best)


def of_network(layers: Mapping[str, Layer], joint: Sequence[GlobalDampingRow] = ()) -> list[Ranked]:
    """Whether one damping can serve all layers; not where steps of all of them together show that it does."""
    best: dict[str, float] = {}
    lows, highs = [0.0], [math.inf]
    for layer in layers.values():
        name = f"kfac_{'reduce' if layer.row.better_flavour == 'reduce' else 'expand'}"
        for found in layer.ranges:
            if (found.approximation, found.form, found.status) == (name, "eigenbasis", "ok"):
                best[layer.name] = found.recommended
                lows += [found.low] if not math.isnan(found.low) else []
                highs += [found.high] if not math.isnan(found.high) else []
    if len(best) < 2:
        return []
    low, high = min(best, key=lambda name: best[name]), max(best, key=lambda name: best[name])
    spread = best[high] / best[low]
    # one value that is safe for all layers serves them, however far their best ones are apart
    if not spread > SPREAD or (max(lows) <= min(highs) and len(lows) + len(highs) > 2):
        return []
    whole = leading(joint)
    if whole is not None and not whole.by_layer:
        return []
    gain = math.nan if whole is None else whole.per_layer_gain
    tried = "" if math.isnan(gain) else f" Tried together, values of their own lower the loss {gain:.0%} more than one."
    row = finding(
        "CS403",
        "info",
        "",
        f"The layers want very different damping: from {best[low]:.2g} ({low}) to {best[high]:.2g} ({high}), a factor "
        f"of {spread:.1g}; no one value is in the safe range of all.{tried}",
        "Set damping for each layer, or relative to the mean of its curvature, rather than one value for all.",
    )
    return [(2, min(1.0, math.log10(spread) / 10), row)]


def _to_set(layer: Layer, whole: GlobalDampingRow | None) -> float:
    """The layer's value to set where all layers move by the leading K-FAC; NaN where there is none."""
    series = None if whole is None else (whole.approximation, whole.form)
    return next((row.joint for row in layer.ranges if (row.approximation, row.form) == series), math.nan)


def _others(row: RangeRow, whole: GlobalDampingRow | None) -> str:
    """What a value to set goes with."""
    other = "" if whole is None or whole.approximation == row.approximation else whole.approximation
    return "with all others at theirs (column set)" + (f" by {_words(other)}" if other else "")


def _too_small(
    layer: Layer, forms: list[RangeRow], whole: GlobalDampingRow | None, to_set: float, short_rate: float
) -> FindingRow:
    row = forms[0]
    step = next((one for one in layer.damping if _same(one, row) and "current" in one.mark), None)
    words = f"With damping {row.current:.2g} {_words(row.approximation)} can't be trusted here"
    if step is not None:
        does = f"loses {step.predicted_decrease:.2g}" if step.predicted_decrease > 0 else "grows"
        words += (
            f": by its step the exact quadratic model {does}, {step.rho:.2g} times what K-FAC promises, where 1/4 is "
            f"the least that is safe; the best length is {step.alpha_star:.2g} of the step"
        )
    if row.current <= row.noise_below:
        words += ", and directions that the batch says nothing about are amplified"
    if not math.isnan(short_rate):
        words += f"; at learning rate {short_rate:.2g} too little of it is taken to do harm in this layer alone"
    return finding(
        "CS401",
        "warning" if math.isnan(short_rate) else "info",
        layer.name,
        words + ".",
        _raise(row, whole, to_set),
    )


def _raise(row: RangeRow, whole: GlobalDampingRow | None, to_set: float) -> str:
    """What to set: values that were tried in steps of all layers together, where there are any."""
    advice = []
    if to_set > row.current:
        advice.append(f"of this layer to {to_set:.2g}, {_others(row, whole)}")
    if whole is not None and whole.safe_damping > row.current:
        by = "" if whole.approximation == row.approximation else f" ({_words(whole.approximation)})"
        advice.append(f"of all layers to {whole.safe_damping:.2g}{by}")
    if advice:
        return f"Raise the damping {', or '.join(advice)}."
    return (
        f"Raise the damping of this layer: {row.recommended:.2g} is the best if only this layer moves (safe from "
        f"{row.low:.2g}); how much all layers together need, --measure steps tells."
    )


def together(
    layers: Mapping[str, Layer],
    joint: Sequence[GlobalDampingRow],
    others: Sequence[Ranked],
    learning_rate: float,
    limits: Thresholds = SHIPPED,
) -> list[Ranked]:
    """CS405: every layer alone stands the current damping, and the step of all layers together does not."""
    if any(row.code in ("CS401", "CS402") and row.severity != "info" for _, _, row in others):
        return []
    name = _better(layers)
    rows = [row for row in joint if row.approximation == name and not math.isnan(row.current_change)]
    # the optimizer's form is not known: every form has to say so
    if not rows or any(row.current_change < 0 for row in rows):
        return []
    if all(learning_rate <= 2 * (1 - limits.trusted) * row.current_alpha_star for row in rows):
        return []
    row = rows[0]
    remedy = "" if math.isnan(row.safe_damping) else f"Raise the damping of all layers to {row.safe_damping:.2g}."
    found = finding(
        "CS405",
        "warning",
        "",
        f"No layer's own block objects to damping {row.current:.2g}, but {_words(name)}'s step of all layers together "
        f"raises the loss by {row.current_change:.2g}; the best length is {row.current_alpha_star:.2g} of it.",
        remedy,
    )
    return [(1, 0.4, found)]


def _better(layers: Mapping[str, Layer]) -> str:
    """The K-FAC that is the better one of most layers."""
    flavours = [layer.row.better_flavour for layer in layers.values() if layer.ranges]
    return f"kfac_{'reduce' if flavours and flavours.count('reduce') * 2 > len(flavours) else 'expand'}"


def _same(step: DampingRow, row: RangeRow) -> bool:
    return (step.approximation, step.form) == (row.approximation, row.form)


def _words(name: str) -> str:
    return name.replace("kfac_", "K-FAC-")


def _gap(gap: float) -> str:
    """What a form gap says of the two steps."""
    if gap > 1:
        return "the step of one form lowers the exact quadratic model, that of the other raises it"
    return f"one form's step lowers the exact quadratic model {gap:.0%} less than the other's"


def _recommended(forms: list[RangeRow]) -> str:
    return " and ".join(f"{row.recommended:.2g} ({row.form})" for row in forms)
