"""What every code stands for, in a few words, and the rows that carry it."""

from __future__ import annotations

from curvscope.records import FindingRow

TITLES = {
    "CS101": "K-FAC-reduce is blind",
    "CS102": "no K-FAC is close",
    "CS103": "the K-FAC flavours differ",
    "CS104": "K-FAC's trace is off",
    "CS201": "no curvature",
    "CS301": "parameters not covered",
    "CS302": "eval mode hides something",
    "CS501": "unstable at this learning rate",
    "CS502": "near the stability threshold",
    "CS503": "stability not assessed",
}


def finding(code: str, severity: str, layer: str, evidence: str, remedy: str, confidence: float = 1.0) -> FindingRow:
    """A finding with its code's title; its rank is given where all are put in order."""
    return FindingRow(
        code=code,
        severity=severity,
        layer=layer,
        title=TITLES[code],
        evidence=evidence,
        remedy=remedy,
        confidence=confidence,
    )
