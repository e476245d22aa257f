"""Signs of trouble beside sharpness: what each is compared with, and how a verdict is made of it.

Every sign is turned so that large is bad: "above" says that it is there. Formulas, thresholds and their sources are in
docs/signs.md, sign by sign; what a threshold means for training is for `curvscope.diagnose` to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from curvscope.records import NAN, StabilityRow


@dataclass(frozen=True)
class Sign:
    """One quantity of the stability table: its threshold (NaN: none) and where that comes from."""

    threshold: float
    source: str


CHOICE = "a choice"
SIGNS: dict[str, Sign] = {
    "update_rms": Sign(2.3, "a choice; compare arXiv:2304.13013"),
    "update_ratio": Sign(0.1, "a choice; compare arXiv:1708.03888"),
    "eps_share": Sign(0.5, CHOICE),
    "beta1_over_root_beta2": Sign(1.0, "arXiv:2208.09632"),
    "early_moments": Sign(2.0, "a choice; bias correction, arXiv:1412.6980"),
    "learning_rate_ratio": Sign(4.0, CHOICE),
    "gradient_noise": Sign(NAN, "arXiv:1812.06162"),
    "gradient_signal": Sign(NAN, "arXiv:1812.06162"),
    "dead_inputs": Sign(0.5, CHOICE),
    "dead_outputs": Sign(0.5, CHOICE),
    "mean_share": Sign(0.9, CHOICE),
    "condition_A": Sign(NAN, "definition"),
    "condition_B": Sign(NAN, "definition"),
    "unresolved_A": Sign(0.0, "numerical rank in float32"),
    "unresolved_B": Sign(0.0, "numerical rank in float32"),
    "kronecker_limit": Sign(0.8, CHOICE),
    "example_share": Sign(0.5, CHOICE),
    "position_share": Sign(0.5, CHOICE),
    "input_scale": Sign(5.0, "a choice; unit variance as in LeCun et al., Efficient BackProp, 1998"),
    "odd_example": Sign(10.0, CHOICE),
    "weight_scale": Sign(3.5, "a choice; sqrt(2) is that of arXiv:1502.01852"),
    "recurrent_radius": Sign(2.0, "a choice; 1 is necessary for explosion, arXiv:1211.5063"),
    "normalisations": Sign(NAN, "arXiv:1502.03167"),
    "signal_drift": Sign(10.0, "a choice; 1 is kept by arXiv:1502.01852"),
    "attention_logit": Sign(50.0, "a choice; compare arXiv:2309.14322"),
    "attention_collapse": Sign(0.9, "a choice; compare arXiv:2303.06296"),
    "saturated_units": Sign(0.9, CHOICE),
    "dead_units": Sign(0.5, CHOICE),
    "logit_gap": Sign(24 * math.log(2), "1 - p is below the resolution of float32"),
    "wrong_and_certain": Sign(0.05, CHOICE),
}


def side(limit: float, value: float, low: float = NAN, high: float = NAN) -> str:
    """On which side of the limit a value lies, by both ends where it has a spread."""
    if math.isnan(value) or math.isnan(limit):
        return "not_assessed"
    least, most = (value if math.isnan(end) else end for end in (low, high))
    return "above" if least > limit else "below" if most <= limit else "undecided"


def sign_row(
    quantity: str,
    value: float,
    *,
    layer: str = "",
    low: float = NAN,
    high: float = NAN,
    threshold: float | None = None,
    stderr: float = NAN,
    status: str = "ok",
    reason: str = "",
) -> StabilityRow:
    """A sign as a row; with a spread its verdict rests on both ends, as that of sharpness does."""
    known = SIGNS[quantity]
    limit = known.threshold if threshold is None else threshold
    return StabilityRow(
        "layer" if layer else "network",
        layer,
        quantity,
        value,
        low,
        high,
        limit,
        side(limit, value, low, high),
        source=known.source,
        value_stderr=stderr,
        status=status,
        reason=reason,
    )


def missing(quantity: str, reason: str, *, layer: str = "", status: str = "not_assessed") -> StabilityRow:
    """A sign that is not known, with the reason: never "below"."""
    return sign_row(quantity, NAN, layer=layer, status=status, reason=reason)
