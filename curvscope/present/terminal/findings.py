"""The findings on the first page: likely root causes in full, what follows from them folded, info in few lines."""

from __future__ import annotations

import math

from curvscope.present.names import some, spoken
from curvscope.present.numbers import count
from curvscope.present.terminal.page import Page, titled
from curvscope.records import FindingRow, Layer, Run

SHOWN = 3
SEVERITIES = ("error", "warning", "info")
FLAVOURS = ("expand", "reduce")


def findings_section(page: Page, run: Run, layers: dict[str, Layer]) -> None:
    """The likely root causes with what follows from each; what is only worth knowing in few lines."""
    findings = run.tables["findings"]
    blank = sum(_unassessed(layer) for layer in layers.values())
    roots = [row for row in findings if not row.caused_by]
    serious = [row for row in roots if row.severity != "info"]
    if not findings:
        nothing = "nothing stands out" if 2 * blank <= len(layers) else "no findings"
        page.heading(nothing)
    elif serious:
        page.heading("what deserves a look")
        # no layer's page has the network's findings
        shown = serious[:SHOWN] + [row for row in serious[SHOWN:] if row.layer not in run.layers]
        for index, row in enumerate(shown):
            if index:
                page.console.print()
            page.findings([row])
            _consequences(page, findings, row)
        more = len(serious) - len(shown)
        if more:
            page.console.print()
            where = "on the pages of their layers" if more > 1 else "on the page of its layer"
            page.lines([page.text(f"and {count(more, 'warning')} more, {where}.", "dim")])
    else:
        page.heading("no warnings")
    _worth_knowing(page, run, [row for row in roots if row.severity == "info"])
    if layers and 2 * blank > len(layers):
        words = (
            f"K-FAC's errors were not assessed for {blank} of {count(len(layers), 'layer')}: little is known of them."
        )
        page.lines([page.text(words, "yellow")])


def _consequences(page: Page, findings: list[FindingRow], root: FindingRow) -> None:
    """What follows from a root cause, folded: a line a code, with the layers."""
    behind: dict[tuple[str, str], list[FindingRow]] = {}
    for row in sorted(followers(findings, root), key=lambda row: SEVERITIES.index(row.severity)):
        behind.setdefault((row.code, row.title), []).append(row)
    lines = []
    for (code, title), rows in behind.items():
        names = [row.layer for row in rows if row.layer]
        where = f" in {some(names, 'layer')}" if names else ""
        style = "" if rows[0].severity != "info" else "dim"
        lines.append(page.text(f"causes {titled(code, title)}{where}", style))
        if rows[0].severity != "info":
            whose = f"{spoken(names[0])}: " if len(names) > 1 else ""
            lines.append(page.text(f"{whose}{rows[0].evidence}", "dim"))
    page.lines(lines, indent=9)


def followers(findings: list[FindingRow], root: FindingRow) -> list[FindingRow]:
    """Everything that follows from a finding, directly or not, in order of rank."""
    names, found = {_name(root)}, []
    for row in findings:
        if row.caused_by in names and _name(row) not in names:
            names.add(_name(row))
            found.append(row)
    return found


def _name(row: FindingRow) -> str:
    return f"{row.code} {row.layer}".strip()


def _worth_knowing(page: Page, run: Run, rows: list[FindingRow]) -> None:
    """Info: the network's in full, the layers' by code in one line."""
    network = [row for row in rows if row.layer not in run.layers]
    if network:
        page.console.print()
        page.findings(network)
    codes: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.layer in run.layers:
            codes[row.code, row.title] = codes.get((row.code, row.title), 0) + 1
    if codes:
        said = ", ".join(f"{titled(code, title)} ({count(n, 'layer')})" for (code, title), n in sorted(codes.items()))
        page.console.print()
        page.lines([page.text(f"Worth knowing, on the layers' pages: {said}.", "dim")])


def _unassessed(layer: Layer) -> bool:
    rows = [layer.errors[name] for flavour in FLAVOURS if (name := f"kfac_{flavour}") in layer.errors]
    return all(math.isnan(row.rel_frobenius) for row in rows)
