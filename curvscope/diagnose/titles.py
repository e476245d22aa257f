"""Findings as rules make them: a row with its code's title, and the size of the effect that ranks it."""

from __future__ import annotations

from dataclasses import dataclass

from curvscope.diagnose.catalog import CATALOG
from curvscope.records import FindingRow


@dataclass(frozen=True)
class Found:
    """A finding before all are put in order; of two of one code the larger `size` comes first."""

    row: FindingRow
    size: float = 0.0


def finding(code: str, severity: str, layer: str, evidence: str, remedy: str, confidence: float = 1.0) -> FindingRow:
    """A finding with its code's title; its rank is given where all are put in order."""
    return FindingRow(
        code=code,
        severity=severity,
        layer=layer,
        title=CATALOG[code].title,
        evidence=evidence,
        remedy=remedy,
        confidence=confidence,
    )


def found(
    code: str, severity: str, layer: str, evidence: str, remedy: str, *, size: float, confidence: float = 1.0
) -> Found:
    """`finding` with its size."""
    return Found(finding(code, severity, layer, evidence, remedy, confidence), size)
