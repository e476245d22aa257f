"""Damped steps of the whole network and the evidence: a section of the first page, and a page of their own."""

from __future__ import annotations

import math

from rich.text import Text

from curvscope.present.numbers import count, number, whole_percent
from curvscope.present.terminal.head import SAMPLE_WORDS
from curvscope.present.terminal.page import STATUS_WORDS, Column, Page
from curvscope.records import EvidenceRow, GlobalDampingRow, Run, StepRow, leading

NAMES = {
    "kfac_expand": "K-FAC-expand",
    "kfac_reduce": "K-FAC-reduce",
    "ekfac_expand": "EKFAC-expand",
    "ekfac_reduce": "EKFAC-reduce",
    "ggn": "exact blocks",
}
ROLE_WORDS = {
    "grid": "",
    "recommended": "recommended",
    "safest": "lowest loss there",
    "current": "the optimizer's",
    "boundary": "",
}
SECTION_COLUMNS = ("predicted", "actual", "rho", "best length")


def steps_section(page: Page, run: Run) -> None:
    """What one damped step of all layers does, for the better K-FAC; the others in a line each."""
    summaries = [row for row in run.tables.get("global_damping", []) if _assessed(row)]
    weights = _evidence_line(page, run)
    reasons = {row.reason for row in run.tables.get("global_damping", [])}
    if not summaries and not weights and not reasons:
        return
    page.heading("one damped step of all layers")
    lines: list[Text] = []
    if summaries:
        better = leading(summaries) or min(summaries, key=_change)
        rows = [row for row in run.tables["steps"] if _key(row) == _key(better)]
        _table(page, rows, better, wanted=SECTION_COLUMNS)
        lines += [*_words(page, better), *_repeated(page, run)]
        if better.status == "estimated":
            lines += [*_of_draws(page, run), page.text("Dampings by layer need exact columns.", "dim")]
        others = [
            f"{_name(row)} {number(row.damping)} ({_signed(row.change)}{_rho_of_unsafe(row, ', ')})"
            for row in summaries
            if _key(row) != _key(better) and not _copied(row) and not math.isnan(row.damping)
        ]
        if others:
            what = "Recommended with other curvature (with rho where that is not safe)"
            lines.append(page.text(f"{what}: {', '.join(others)}.", "dim"))
    else:
        lines.append(page.text(f"{page.dash} not assessed: ", "yellow").append(page.safe(min(reasons)), style="dim"))
    page.lines([*lines, *weights])
    if page.path is not None and summaries:
        page.command("curvscope", "show", page.path, "--steps")


def steps_page(page: Page, run: Run) -> None:
    """Every approximation's steps in full, and the evidence."""
    summaries = run.tables["global_damping"]
    copies = {(row.approximation, row.form) for row in summaries if _assessed(row) and _copied(row)}
    for summary in summaries:
        if _key(summary) in copies:
            continue
        rows = [row for row in run.tables["steps"] if _key(row) == _key(summary)]
        twin = summary.approximation.replace("_expand", "_reduce"), summary.form
        name = NAMES.get(summary.approximation, summary.approximation) + (" = reduce" if twin in copies else "")
        page.heading(f"{name}, {summary.form} damping")
        if _assessed(summary):
            _table(page, rows, summary)
            page.lines(_words(page, summary))
            page.lines([page.text(f"{count(summary.passes, 'forward or backward pass', 'passes')}.", "dim")])
        said: dict[str, None] = dict.fromkeys(row.reason for row in (summary, *rows) if row.reason)
        page.lines(
            [
                page.text(f"{page.dash} {STATUS_WORDS.get(summary.status, summary.status)}: {reason}", "dim")
                for reason in said
            ]
        )
    _evidence(page, run.tables["evidence"])


def _key(row: StepRow | GlobalDampingRow) -> tuple[str, str]:
    return row.approximation, row.form


def _assessed(row: GlobalDampingRow) -> bool:
    return row.status in ("ok", "estimated")


def _copied(row: GlobalDampingRow) -> bool:
    """Whether it is the other flavour of the same matrix, which took no passes of its own."""
    return row.passes == 0


def _name(row: GlobalDampingRow) -> str:
    return NAMES.get(row.approximation, row.approximation) + (" (factored)" if row.form == "factored" else "")


def _change(row: GlobalDampingRow) -> float:
    """The change at the recommended damping; those without one last."""
    return math.inf if math.isnan(row.change) else row.change


def _rho_of_unsafe(row: GlobalDampingRow, before: str = "") -> str:
    """Rho of a recommended damping that is not safe; empty where it is."""
    if row.recommended_is_safe:
        return ""
    return before + ("rho within rounding" if math.isnan(row.rho) else f"rho {number(row.rho)}")


def _unsafe(row: GlobalDampingRow) -> str:
    """That the recommended damping is not safe, or not known to be; empty where it is."""
    rho = _rho_of_unsafe(row)
    return rho if not rho or math.isnan(row.rho) else f"not safe, {rho}"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


def _table(page: Page, rows: list[StepRow], summary: GlobalDampingRow, wanted: tuple[str, ...] = ()) -> None:
    """A row a damping, marked where it is safe."""

    def cells(name: str, signed: bool = False) -> list[tuple[str, str]]:
        values = [getattr(row, name) for row in rows]
        return [(page.dash if math.isnan(v) else _signed(v) if signed else number(v), "") for v in values]

    safe = [not math.isnan(summary.safe_from) and row.damping >= summary.safe_from for row in rows]
    marks = [(_mark(row, inside), "") for row, inside in zip(rows, safe, strict=True)]
    columns = {
        "predicted": Column("predicted\nchange", cells("predicted_change", True), worth=8),
        "actual": Column("actual\nchange", cells("actual_change", True), worth=10),
        "rho": Column("\nrho", cells("rho"), worth=9),
        "best length": Column("best\nlength", cells("best_step_length"), worth=5),
        "best change": Column("change\nthere", cells("best_length_change", True), worth=4),
        "model length": Column("model\nholds to", cells("model_length"), worth=3),
        "norm": Column("\n||step||", cells("step_norm"), worth=2),
        "angle": Column("angle to\n-gradient", cells("angle_to_gradient_degrees"), worth=2),
        "relative": Column("over mean\neigenvalue", cells("relative_damping"), worth=1),
    }
    shown = [column for name, column in columns.items() if not wanted or name in wanted]
    page.table(
        [Column("\ndamping", cells("damping"), worth=100), *shown, Column("\n", marks, worth=7, left=True)],
        ["" if inside else "dim" for inside in safe],
    )


def _mark(row: StepRow, safe: bool) -> str:
    """What a damping is: safe, and why it was tried."""
    role = ROLE_WORDS.get(row.role, row.role)
    if row.role == "recommended":
        return f"safe, {role}" if safe else f"{role}, not safe"
    return ", ".join(filter(None, ("safe" if safe else "", role)))


def _words(page: Page, row: GlobalDampingRow) -> list[Text]:
    """The recommendation, the safe range, the gain of dampings a layer, the optimizer's own."""
    lines = []
    if math.isnan(row.damping):
        lines.append(page.text("No damping that was tried lowers the loss.", "yellow"))
    else:
        beside = f" ({_unsafe(row)})" if _unsafe(row) else ""
        words = (
            f"{_name(row)}: recommended damping {number(row.damping)}{beside} for all layers, {_signed(row.change)} by "
        )
        lines.append(page.text(words + "one full step, the lowest loss of all tried.", "bold"))
    if math.isnan(row.safe_damping):
        lines.append(page.text("No damping that was tried is safe (a decrease predicted, rho at least 1/4).", "yellow"))
    else:
        words = f"Safe from {number(row.safe_from)} on (a decrease predicted, rho at least 1/4)"
        if row.safe_damping != row.damping:
            words += (
                f"; lowest there at {number(row.safe_damping)} ({_signed(row.safe_change)}), the one for many steps"
            )
        lines.append(page.text(words + "."))
    if not math.isnan(row.gradient_from):
        lines.append(
            page.text(f"From {number(row.gradient_from)} on the step is within 18 degrees of the plain gradient's.")
        )
    if not math.isnan(row.current):
        words = f"The optimizer's own damping is {number(row.current)}: {_signed(row.current_change)} by the full step."
        lines.append(page.text(words, "bold" if row.current < row.safe_from or math.isnan(row.safe_from) else ""))
    lines += _by_layer(page, row)
    return lines


def _by_layer(page: Page, row: GlobalDampingRow) -> list[Text]:
    """What a damping for each layer gains over one for all."""
    if math.isnan(row.per_layer_change):
        return []
    words = f"A damping for each layer, its own best times {number(row.per_layer_factor)}"
    words += f" (set): {_signed(row.per_layer_change)}" if row.by_layer else f": {_signed(row.per_layer_change)}"
    if not math.isnan(row.per_layer_gain):
        more = "more" if row.per_layer_gain > 0 else "less"
        words += f", {whole_percent(abs(row.per_layer_gain))} {more} than one for all"
    return [page.text(words + ("." if row.by_layer else ": set one value for all."), "dim")]


def _repeated(page: Page, run: Run) -> list[Text]:
    """Says that safe for one step is not stable for many, where the K-FAC in use is unstable."""
    unstable = any(
        row.quantity == "preconditioned_sharpness" and row.scope == "network" and row.verdict == "above"
        for row in run.tables.get("stability", [])
    )
    if not (unstable and run.model.optimizer.startswith("K-FAC")):
        return []
    words = "Safe means one step of full length from here; the optimizer's steps, one after another, are unstable "
    return [page.text(words + "(CS501): both hold.", "yellow")]


def _of_draws(page: Page, run: Run) -> list[Text]:
    """Says that steps or the evidence come from draws, and that their error is not known."""
    drawn = count(run.info.samples, *SAMPLE_WORDS.get(run.info.fisher, ("draw", "")))
    words = f"By factors made of {drawn}: how far those of other draws would differ is not assessed."
    return [page.text(words, "yellow")]


def _evidence_line(page: Page, run: Run) -> list[Text]:
    """The weight decay that each spectrum suggests."""
    best = [row for row in run.tables.get("evidence", []) if row.role == "maximum" and row.status != "not_assessed"]
    if not best:
        return []
    values: dict[str, list[str]] = {}
    for row in best:
        values.setdefault(number(row.weight_decay), []).append(NAMES.get(row.approximation, row.approximation))
    each = ", ".join(f"{value} ({', '.join(names)})" for value, names in values.items())
    line = page.text(f"Laplace evidence is highest at an L2 weight decay (not AdamW's) of {each}.")
    return [line, *(_of_draws(page, run) if best[0].status == "estimated" else [])]


def _evidence(page: Page, rows: list[EvidenceRow]) -> None:
    """Log evidence over prior precision, an approximation a column, with what was assumed."""
    if not rows:
        return
    page.heading("Laplace log evidence of the training set")
    for name in dict.fromkeys(row.approximation for row in rows):
        own = sorted(
            (r for r in rows if r.approximation == name and r.status != "not_assessed"), key=lambda r: r.precision
        )
        if not own:
            continue
        marks = [("maximum" if row.role == "maximum" else "", "") for row in own]
        page.table(
            [
                Column(f"{NAMES.get(name, name)}\nprecision", [(number(row.precision), "") for row in own], worth=9),
                Column("L2 weight\ndecay", [(number(row.weight_decay), "") for row in own], worth=8),
                Column("log\nevidence", [(number(row.log_evidence, 5), "") for row in own], worth=10),
                Column("effective\nparameters", [(number(row.effective_parameters), "") for row in own], worth=5),
                Column("\n", marks, worth=7, left=True),
            ]
        )
    reasons: dict[str, None] = dict.fromkeys(row.reason for row in rows if row.reason)
    page.lines([page.text(f"{page.dash} {reason}", "dim") for reason in reasons])
