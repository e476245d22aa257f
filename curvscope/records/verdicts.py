"""The rows that judge: stability, the examples to blame, findings."""

from __future__ import annotations

from dataclasses import dataclass

from curvscope.records.layers import NAN


@dataclass(frozen=True)
class StabilityRow:
    """One number that stability is judged by, of the network or of one layer.

    `low` and `high` are the spread over the batch and its halves, or the 95 % interval of a number from draws, which
    has a `value_stderr`; `threshold` is what the number is compared with, `verdict` above, below, undecided or
    not_assessed: above only where `low` is above the threshold, below only where `high` is below it. A layer that is
    below says nothing of the network. `residual` is ||Mx - lambda x|| of an eigenvalue.
    """

    scope: str
    layer: str
    quantity: str
    value: float = NAN
    low: float = NAN
    high: float = NAN
    threshold: float = NAN
    verdict: str = "not_assessed"
    residual: float = NAN
    source: str = ""
    value_stderr: float = NAN
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class ExampleRow:
    """One of the examples that carry most of the top curvature, of a layer or ("") of the network.

    `curvature_share` is the example's part of u^T G u, u the top eigenvector (of the layer's block; for the network the
    direction that the stability verdict speaks of); `gradient_share` its part of the sum of squared gradient norms.
    """

    layer: str
    example: int
    curvature_share: float = NAN
    gradient_share: float = NAN
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class FindingRow:
    """One thing worth knowing: code, severity (info, warning, error), layer ("" = network), evidence, remedy.

    `title` says in a few words what the code stands for; `rank` counts from 1, the most important; `caused_by` is the
    code of the finding whose consequence this is, with its layer behind a blank, empty where it stands on its own.
    """

    code: str
    severity: str
    layer: str
    title: str = ""
    evidence: str
    remedy: str
    confidence: float = 1.0
    rank: int = 0
    caused_by: str = ""
    status: str = "ok"
    reason: str = ""
