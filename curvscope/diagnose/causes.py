"""Which finding follows from which, and the order that a reader should take them in: likely root causes first.

A table says for each code what may cause it, the likelier first, and where that must lie. The first that is found is
named in `caused_by`; a finding without a cause is a root. A cause is at least as severe as the worst of what it
causes. Roots stand in order of severity, of how specific they are, and of confidence; what they cause follows them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from curvscope.diagnose.thresholds import SHIPPED, Thresholds
from curvscope.diagnose.titles import Found
from curvscope.records import FindingRow, StabilityRow

SEVERITIES = ("error", "warning", "info")


@dataclasses.dataclass(frozen=True)
class Context:
    """What relations are judged by: all findings, and each layer's part in the top direction."""

    findings: Sequence[Found]
    shares: Mapping[str, float]
    above: frozenset[str]
    limits: Thresholds = SHIPPED

    def has(self, code: str, layer: str) -> bool:
        """Whether there is a finding of this code at this layer."""
        return any(one.row.code == code and one.row.layer == layer for one in self.findings)


Relation = Callable[[FindingRow, FindingRow, Context], bool]


def _anywhere(cause: FindingRow, effect: FindingRow, context: Context) -> bool:
    return True


def _same(cause: FindingRow, effect: FindingRow, context: Context) -> bool:
    return cause.layer == effect.layer


def _warned(cause: FindingRow, effect: FindingRow, context: Context) -> bool:
    """The cause is a warning by itself."""
    return cause.severity != "info"


def _elsewhere(cause: FindingRow, effect: FindingRow, context: Context) -> bool:
    return cause.layer != effect.layer


def _part(cause: FindingRow, effect: FindingRow, context: Context) -> bool:
    """The cause's layer is above on its own, or has a part in the top direction."""
    return cause.layer in context.above or context.shares.get(cause.layer, 0.0) >= context.limits.part


def _by_weights(cause: FindingRow, effect: FindingRow, context: Context) -> bool:
    """The cause's layer has weights out of scale: it was not carried there by its inputs."""
    return context.has("CS211", cause.layer)


def _not_by_weights(cause: FindingRow, effect: FindingRow, context: Context) -> bool:
    return not context.has("CS211", effect.layer)


UNSTABLE: tuple[tuple[str, Relation], ...] = (
    ("CS214", _anywhere),
    ("CS213", _anywhere),
    ("CS212", _warned),
    ("CS209", _anywhere),
    ("CS210", _by_weights),
    ("CS504", _part),
    ("CS507", _anywhere),
    ("CS401", _anywhere),
    ("CS211", _anywhere),
    ("CS505", _anywhere),
    ("CS215", _anywhere),
)
CAUSES: dict[str, tuple[tuple[str, Relation], ...]] = {
    "CS501": UNSTABLE,
    "CS502": UNSTABLE,
    "CS505": (
        ("CS214", _anywhere),
        ("CS213", _anywhere),
        ("CS212", _warned),
        ("CS209", _anywhere),
        ("CS210", _by_weights),
        ("CS211", _anywhere),
        ("CS507", _anywhere),
    ),
    "CS508": (("CS504", _anywhere), ("CS214", _anywhere), ("CS213", _anywhere), ("CS505", _anywhere),
              ("CS211", _anywhere), ("CS210", _by_weights), ("CS209", _anywhere), ("CS401", _anywhere),
              ("CS501", _anywhere)),
    "CS201": (("CS202", _anywhere), ("CS203", _anywhere), ("CS209", _same), ("CS210", _anywhere)),
    "CS202": (("CS213", _anywhere), ("CS211", _elsewhere), ("CS504", _same)),
    "CS203": (("CS213", _anywhere), ("CS212", _warned), ("CS211", _anywhere)),
    "CS204": (("CS202", _elsewhere),),
    "CS205": (("CS213", _same), ("CS215", _anywhere), ("CS203", _elsewhere), ("CS202", _elsewhere),
              ("CS211", _elsewhere)),
    "CS206": (("CS202", _anywhere), ("CS203", _anywhere), ("CS213", _same), ("CS211", _same), ("CS212", _warned),
              ("CS209", _same), ("CS205", _same), ("CS204", _same)),
    "CS207": (("CS214", _anywhere),),
    "CS213": (("CS214", _anywhere),),
    "CS209": (("CS213", _anywhere), ("CS211", _elsewhere), ("CS504", _same)),
    "CS210": (("CS214", _anywhere), ("CS213", _anywhere), ("CS212", _warned), ("CS211", _elsewhere),
              ("CS505", _not_by_weights), ("CS504", _anywhere), ("CS507", _anywhere)),
    "CS211": (("CS507", _anywhere), ("CS210", _same), ("CS209", _same), ("CS212", _same), ("CS504", _same)),
    "CS104": (("CS102", _same),),
    "CS103": (("CS101", _same),),
}  # fmt: skip
# Findings that say nothing new unless something causes them.
ONLY_AS_CONSEQUENCE = ("CS206",)
# Info that is told only where it causes something.
ONLY_AS_CAUSE = ("CS215",)
# The order of roots of one severity: what names one fault before what many faults bring about.
SPECIFIC = (
    "CS214", "CS213", "CS212", "CS209", "CS504", "CS507", "CS506", "CS401", "CS402", "CS202", "CS203", "CS210", "CS211",
    "CS505", "CS501", "CS509", "CS201", "CS215", "CS508", "CS502", "CS503", "CS207",
)  # fmt: skip


def ordered(
    findings: Sequence[Found], table: Sequence[StabilityRow] = (), limits: Thresholds = SHIPPED
) -> list[FindingRow]:
    """The findings with `caused_by`, severities raised to those of their consequences, and ranks from 1."""
    shares = {row.layer: row.value for row in table if row.quantity == "direction_share"}
    above = frozenset(
        row.layer
        for row in table
        if row.quantity == "preconditioned_sharpness" and row.layer and row.verdict == "above"
    )
    context = Context(findings, shares, above, limits)
    causes = {index: _cause(index, findings, context) for index in range(len(findings))}
    for index in causes:
        if _in_circle(index, causes):
            causes[index] = None
    kept = [
        index
        for index, one in enumerate(findings)
        if (one.row.code not in ONLY_AS_CONSEQUENCE or causes[index] is not None)
        and (one.row.code not in ONLY_AS_CAUSE or one.row.severity != "info" or index in causes.values())
    ]
    children: dict[int | None, list[int]] = {}
    for index in kept:
        children.setdefault(causes[index], []).append(index)
    severity = {index: _worst(index, findings, children) for index in kept}

    def key(index: int) -> tuple[int, int, float, float]:
        one = findings[index]
        specific = SPECIFIC.index(one.row.code) if one.row.code in SPECIFIC else len(SPECIFIC)
        return severity[index], specific, -one.row.confidence, -one.size

    rows: list[FindingRow] = []

    def place(index: int) -> None:
        cause = causes[index]
        named = "" if cause is None else f"{findings[cause].row.code} {findings[cause].row.layer}".strip()
        rows.append(
            dataclasses.replace(
                findings[index].row, severity=SEVERITIES[severity[index]], caused_by=named, rank=len(rows) + 1
            )
        )
        for child in sorted(children.get(index, []), key=key):
            place(child)

    for root in sorted(children.get(None, []), key=key):
        place(root)
    return rows


def _cause(index: int, findings: Sequence[Found], context: Context) -> int | None:
    """The likeliest cause of a finding: the first code of its list that is there, the largest of several."""
    effect = findings[index].row
    for code, relation in CAUSES.get(effect.code, ()):
        fitting = [
            number
            for number, one in enumerate(findings)
            if number != index and one.row.code == code and relation(one.row, effect, context)
        ]
        if fitting:
            return max(fitting, key=lambda number: findings[number].size)
    return None


def _in_circle(index: int, causes: Mapping[int, int | None]) -> bool:
    """Whether following the causes leads back here."""
    at, steps = causes[index], 0
    while at is not None and at != index and steps < len(causes):
        at, steps = causes[at], steps + 1
    return at == index


def _worst(index: int, findings: Sequence[Found], children: Mapping[int | None, list[int]]) -> int:
    own = SEVERITIES.index(findings[index].row.severity)
    return min([own, *(_worst(child, findings, children) for child in children.get(index, []))])
