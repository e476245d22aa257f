"""CS102: no K-FAC is close to a layer's block; by what the error comes from, what would help and what would not."""

from __future__ import annotations

import math

from curvscope.diagnose.titles import finding
from curvscope.records import ErrorRow, FindingRow, Layer

LARGE_ERROR = 0.5
FLAVOUR_GAP = 1.5
# The nearest Kronecker product is the limit where its error is over this share of the better K-FAC's.
LIMIT = 0.8
# EKFAC is the remedy where its error is under this share of the better K-FAC's.
HELPED = 0.5
# The part that is named has at least this share of the error.
MAIN_SHARE = 0.5
SOURCE_WORDS = {
    "spread": "curvature that depends on the inputs' deviation from their mean",
    "mean": "the inputs' mean",
    "cross": "positions of an example adding up",
}
# Standard errors on either side of an estimate (95 %, 8 draws) that have to lie on one side of a threshold.
BAR = 2.4


def of_layer(layer: Layer, *, blind: bool) -> tuple[float, FindingRow] | None:
    """The better K-FAC's error and the finding, where it is over 0.5; `blind`: reduce is, which is told by CS101.

    The remedy follows the error's source (tables/sources): the inputs' mean can be taken out of them, positions that
    add up are what the flavours differ in, and curvature that goes with the inputs is EKFAC's to correct. What the
    nearest single Kronecker product (`kron_best`) leaves no choice of factors takes away.
    """
    expand, reduce = layer.errors["kfac_expand"], layer.errors["kfac_reduce"]
    closer, flavour = (expand, "expand") if expand.rel_frobenius <= reduce.rel_frobenius else (reduce, "reduce")
    best = closer.rel_frobenius
    if not best > LARGE_ERROR:
        return None
    if layer.row.positions == 1:
        evidence = f"K-FAC is not close to the exact block: relative error {best:.2f}"
    else:
        evidence = (
            f"Neither flavour is close to the exact block: relative errors {expand.rel_frobenius:.2f} (expand) and "
            f"{reduce.rel_frobenius:.2f} (reduce)"
        )
    nearest = _error(layer, "kron_best")
    limited = LIMIT * best < nearest <= best
    if limited:
        evidence += f", and even the nearest single Kronecker product is off by {nearest:.2f}"
    elif nearest <= best:
        evidence += f"; the nearest single Kronecker product is off by {nearest:.2f}"
    undecided = best - bar(closer.rel_frobenius_stderr) <= LARGE_ERROR
    if undecided:
        evidence += f"; undecided, as the error bar of {best:.2f} reaches {LARGE_ERROR:g}"
    source, share = _source(layer, flavour)
    if source:
        whose = "it" if layer.row.positions == 1 else f"{flavour}'s error"
        evidence += f". {min(share, 1.0):.0%} of {whose} comes from {SOURCE_WORDS[source]}"
    better = clearly_better(expand, reduce)
    remedy = [f"Use K-FAC-{better}, the closer one."] if better and not blind else []
    remedy.append(_remedy(layer, flavour, best, source, limited=limited))
    severity = "info" if undecided else "warning"
    return best, finding("CS102", severity, layer.name, f"{evidence}.", " ".join(remedy))


def _remedy(layer: Layer, flavour: str, best: float, source: str, *, limited: bool) -> str:
    """What to do about the error, by its source, and what is left to damping."""
    ekfac = _error(layer, f"ekfac_{flavour}")
    if ekfac < HELPED * best:
        return f"EKFAC in the same basis is off by {ekfac:.2f}: correct the eigenvalues before anything else."
    words = []
    if source == "mean":
        words.append("Centre its inputs, or put a norm in front: without a mean this part of the error is gone.")
    elif source == "cross" and flavour == "expand":
        words.append("Expand leaves out what positions have in common, and reduce is no closer.")
    elif source == "cross":
        words.append("Reduce takes positions for equal, which they are not, and expand is no closer.")
    if ekfac < best:
        words.append(
            f"EKFAC in the same basis is off by {ekfac:.2f}{': hardly better' if ekfac > LIMIT * best else ''}."
        )
    if limited:
        words.append("No other choice of two factors helps: its own damping is in the damping section.")
    else:
        words.append("Take the damping that the damping section gives for it, or a first-order step of its own.")
    return " ".join(words)


def _error(layer: Layer, name: str) -> float:
    """An approximation's error, NaN where it is not known."""
    row = layer.errors.get(name)
    return math.nan if row is None else row.rel_frobenius


def _source(layer: Layer, flavour: str) -> tuple[str, float]:
    """What most of a K-FAC's error comes from, and its share; empty where that is not known."""
    row = layer.sources.get(f"kfac_{flavour}")
    if row is None or math.isnan(row.spread):
        return "", math.nan
    shares = {name: float(getattr(row, name)) for name in SOURCE_WORDS}
    first = max(shares, key=lambda name: shares[name])
    return (first, shares[first]) if shares[first] >= MAIN_SHARE else ("", math.nan)


def bar(stderr: float) -> float:
    """Half of an estimate's 95 % interval; nothing where the number is exact."""
    return 0.0 if math.isnan(stderr) else BAR * stderr


def clearly_better(expand: ErrorRow, reduce: ErrorRow) -> str:
    """The flavour whose error is smaller by more than FLAVOUR_GAP, or nothing."""
    low, high = sorted((expand.rel_frobenius, reduce.rel_frobenius))
    bars = math.hypot(bar(expand.rel_frobenius_stderr), bar(reduce.rel_frobenius_stderr))
    if low <= 0 or high / low <= FLAVOUR_GAP or high - low <= bars:
        return ""
    return "expand" if expand.rel_frobenius < reduce.rel_frobenius else "reduce"
