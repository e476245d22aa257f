"""Damping on the report's pages: a strip a layer on the first one, every form and value on a layer's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.text import Text

from curvscope.present.names import shorten, some
from curvscope.present.numbers import number
from curvscope.present.strip import strip
from curvscope.present.terminal.page import GAP, STATUS_WORDS, Column, Page
from curvscope.present.terminal.steps import NAMES
from curvscope.present.terminal.twins import same, title, without_twins
from curvscope.records import DampingRow, GlobalDampingRow, Layer, RangeRow, leading

# the clause of a row's reason that says why it has no value to set
JOINT = "joint: "

STANDING_WORDS = {"too_small": "too small", "safe": "safe", "too_large": "too large", "": ""}
STANDING_STYLES = {"too_small": "red", "safe": "green", "too_large": "yellow", "": "dim"}
GRID_COLUMNS = (
    ("relative", "rel. to\nmean", 8),
    ("angle_degrees", "angle\nto exact", 9),
    ("length_ratio", "length\nratio", 6),
    ("decrease_share", "decrease\nshare", 10),
    ("rho", "\nrho", 7),
    ("effective_dimension", "eff.\ndim.", 4),
    ("angle_to_gradient_degrees", "angle\nto grad.", 5),
    ("alpha_star", "\nalpha*", 3),
    ("condition", "condi-\ntion", 2),
)

# Shares, ratios and conditions are told up to here.
BEYOND = 1e6


def chosen(layer: Layer) -> str:
    """The K-FAC that the pages speak of: the better one."""
    return f"kfac_{'reduce' if layer.row.better_flavour == 'reduce' else 'expand'}"


def overview_section(
    page: Page, layers: Sequence[Layer], optimizer: str = "", together: Sequence[GlobalDampingRow] = ()
) -> None:
    """A strip for each layer: safe range, best value, and where the optimizer (its name; empty: unknown) stands.

    `together` are the rows of tables/global_damping: the values to set are those of their leading K-FAC in every layer.
    """
    found = [(layer, _range(layer, chosen(layer), "eigenbasis")) for layer in layers]
    known = [(layer, row) for layer, row in found if row is not None]
    if not known:
        reasons = list(dict.fromkeys(row.reason for layer in layers for row in layer.damping if row.reason))
        if reasons:
            page.heading("damping of the better K-FAC")
            line = page.text(f"{page.dash} not assessed: ", "yellow")
            drawn = any(row.fisher in ("probe", "mc") for layer in layers for row in layer.errors.values())
            more = (
                "; --fisher exact gives it, for layers that are not too large"
                if drawn and "--memory" not in reasons[0]
                else ""
            )
            line.append(page.safe(reasons[0] + more), "dim")
            page.lines([line, *_concerns(page, optimizer)])
        return
    page.heading("damping of the better K-FAC")
    standing = any(row.standing for _, row in known)
    columns = [
        Column("from 1e-8 of the\nmean eigenvalue up", [(_strip(page, *one), "cyan") for one in known], 50, left=True),
        Column("if only this layer moved:\nsafe", [(_safe(row), "") for _, row in known], 8, left=True),
        Column("\nbest", [(page.measured(row.recommended), "") for _, row in known], 7),
    ]
    if standing:
        places = [(STANDING_WORDS[row.standing], STANDING_STYLES[row.standing]) for _, row in known]
        columns.append(Column("\nnow", places, 6, left=True))
    whole = leading(together)
    series = (whole.approximation, whole.form) if whole is not None else ("", "")
    to_set = [_range(layer, *series) for layer, _ in known]
    joint = [math.nan if row is None else row.joint for row in to_set]
    if not all(map(math.isnan, joint)):
        columns.append(Column("all move:\nset", [(page.measured(value), "bold") for value in joint], 9))
    names = [page.safe(layer.name) for layer, _ in known]
    longest = max(len(name) for name in names)
    every, columns = columns, page.fitting(columns, page.width - 2 - GAP - min(longest, max(12, page.width // 4)))
    width = max(10, min(longest, page.width - 2 - GAP - page.needed(columns)))
    short = [(name, "") for name in shorten(names, width, page.ellipsis)]
    page.table([Column("\nlayer", short, worth=100, left=True), *columns])
    cross = "x" if page.ascii_only else "×"
    empirical = any(row.fisher == "empirical" for layer, _ in known for row in layer.errors.values())
    model = "quadratic model with the empirical Fisher" if empirical else "exact quadratic model"
    if missing := page.left_out(every, columns):
        page.no_room(missing)
    words = f"strip: how much the {model} loses by K-FAC's step, a factor of 10 a step; {cross}: it grows"
    words += "; [ ] the safe range, above which the step is plain gradient descent"
    if standing:
        words += "; now: one step of this layer alone, which says nothing of many steps (CS5xx) or of all layers"
    if whole is not None and not all(map(math.isnan, joint)):
        words += f"; set: where all move by {NAMES[whole.approximation]}, its best times a common factor"
        plain = [row.layer for row in to_set if row is not None and row.joint > row.high]
        if plain:
            words += f", which leaves {some(plain, 'layer')} with plain gradient steps"
    now = {row.current for _, row in known if not math.isnan(row.current)}
    if len(now) == 1:
        words += f"; | the optimizer's damping, {number(now.pop())}"
    elif now:
        words += "; | the optimizer's damping"
    unset = _unset(page, [layer for layer, _ in known], series) if whole is not None else []
    page.lines([page.text(words + ".", "dim"), *_left_out(page, found), *unset, *_concerns(page, optimizer)])


def _left_out(page: Page, found: Sequence[tuple[Layer, RangeRow | None]]) -> list[Text]:
    """The layers without a strip, or without a range on it, and why: a line a reason."""
    names: dict[str, list[str]] = {}
    for layer, row in found:
        if row is None or row.status != "ok":
            rows: Sequence[DampingRow | RangeRow] = [row] if row else layer.damping
            own = [one.reason for one in rows if one.reason and one.approximation == chosen(layer)]
            reason = next(iter([*own, *(one.reason for one in rows if one.reason)]), "")
            names.setdefault(reason, []).append(layer.name)
    lines = []
    for reason, layers in names.items():
        line = page.text(f"{page.dash} not assessed: ", "yellow")
        lines.append(line.append(page.safe(": ".join(filter(None, (some(layers, "layer"), reason)))), style="dim"))
    return lines


def _unset(page: Page, layers: Sequence[Layer], series: tuple[str, str]) -> list[Text]:
    """The layers without a value to set, and why: a line a reason."""
    names: dict[str, list[str]] = {}
    for layer in layers:
        row = _range(layer, *series)
        if row is None or math.isnan(row.joint):
            reason = next((one for one in (row.reason if row else "").split("; ") if one.startswith(JOINT)), "")
            names.setdefault(reason.removeprefix(JOINT), []).append(layer.name)
    lines = []
    for reason, concerned in names.items():
        who = "" if len(concerned) == len(layers) else f" of {some(concerned, 'layer')}"
        line = page.text(f"{page.dash} no value to set{who}: ", "yellow")
        lines.append(line.append(page.safe(f"{NAMES[series[0]]}: {reason}"), style="dim"))
    return lines


def _concerns(page: Page, optimizer: str) -> list[Text]:
    """What the section means for a run whose optimizer has no damping of K-FAC's kind."""
    kind = optimizer.partition(",")[0]
    if kind in ("", "K-FAC"):
        return []
    if kind == "Shampoo":
        words = "Shampoo's damping is inside a root of its factors, in other units: these values are not for it."
    else:
        words = (
            f"{kind} has no such damping: the section says what a K-FAC step from here would need, not what to change."
        )
    return [page.text(words, "dim")]


def layer_section(page: Page, layer: Layer) -> None:
    """Every approximation and form in a line, then the better K-FAC's steps value by value."""
    if not layer.damping and not layer.ranges:
        return
    page.heading("damping")
    if layer.ranges:
        _ranges(page, layer)
    for form in ("eigenbasis", "factored"):
        name = chosen(layer) if layer.factors else "diag"
        rows = [row for row in layer.damping if (row.approximation, row.form) == (name, form)]
        if any(not math.isnan(row.damping) for row in rows):
            page.console.print()
            page.lines([page.text(f"{title(layer, name)}, {form} form, against the exact damped step", "bold")])
            _grid(page, rows)
    rest = [row for row in layer.damping if math.isnan(row.damping) and not layer.ranges]
    page.lines([_reason(page, "", row) for row in rest])


def _ranges(page: Page, layer: Layer) -> None:
    rows = without_twins(layer, layer.ranges)
    better = "" if same(layer) else chosen(layer)
    names = [(row.approximation + ("*" if row.approximation == better else ""), "") for row in rows]
    columns = [
        Column("\napproximation", names, 100, left=True),
        Column("\nform", [(row.form, "") for row in rows], 90, left=True),
        Column("\nstrip", [(_strip(page, layer, row), "cyan") for row in rows], 5, left=True),
        Column("\nsafe", [(_safe(row), "") for row in rows], 9, left=True),
        Column("\nbest", [(page.measured(row.recommended), "") for row in rows], 8),
    ]
    if any(row.standing for row in rows):
        words = [(STANDING_WORDS[row.standing] or page.dash, STANDING_STYLES[row.standing]) for row in rows]
        columns.append(Column("\nnow", words, 7, left=True))
        columns.append(Column("\ngain", [(page.measured(row.gain), "") for row in rows], 6))
    if any(not math.isnan(row.joint) for row in rows):
        columns.append(Column("\nset", [(page.measured(row.joint), "bold") for row in rows], 10))
    columns.append(Column("form\ngap", [(page.measured(row.form_gap), "") for row in rows], 3))
    page.table(columns)
    legend = "safe and best: if only this layer moves"
    legend += "; set: all layers together" if any(not math.isnan(row.joint) for row in rows) else ""
    legend += "; expand = reduce here" if same(layer) else ""
    lines = [page.text(legend + ".", "dim")]
    for reason in dict.fromkeys(row.reason for row in rows if row.reason):
        concerned = [row for row in rows if row.reason == reason]
        who = ", ".join(f"{row.approximation} {row.form}" for row in concerned)
        lines.append(_reason(page, "all " if len(concerned) == len(rows) > 1 else f"{who} ", concerned[0]))
    page.lines(lines)


def _grid(page: Page, rows: Sequence[DampingRow]) -> None:
    marks = [(row.mark.replace("recommended", "best").replace("current", "now"), "bold") for row in rows]
    columns = [Column("\ndamping", [(page.measured(row.damping), "") for row in rows], 100)]
    columns.append(Column("\n", marks, 99, left=True))
    for name, header, worth in GRID_COLUMNS:
        columns.append(Column(header, [(_bounded(page, getattr(row, name)), "") for row in rows], worth))
    page.table(columns)
    lines: list[Text] = []
    for reason in dict.fromkeys(row.reason for row in rows if row.reason):
        concerned = [row for row in rows if row.reason == reason]
        lines.append(_reason(page, f"{len(concerned)} of {len(rows)} ", concerned[0]))
    page.lines(lines)


def _bounded(page: Page, value: float) -> str:
    """A number up to a million either way: beyond it is far outside of what a model of the step describes."""
    if abs(value) <= BEYOND:
        return page.measured(value)
    return page.dash if math.isnan(value) else f"<-{number(BEYOND, 1)}" if value < 0 else f">{number(BEYOND, 1)}"


def _reason(page: Page, who: str, row: DampingRow | RangeRow) -> Text:
    words = f"{page.dash} {who}{STATUS_WORDS.get(row.status, row.status)}: "
    line = page.text(words, "" if row.status == "ok" else "yellow")
    line.append(page.safe(row.reason), style="dim")
    return line


def _range(layer: Layer, approximation: str, form: str) -> RangeRow | None:
    wanted = (approximation, form)
    return next((row for row in layer.ranges if (row.approximation, row.form) == wanted), None)


def _strip(page: Page, layer: Layer, found: RangeRow) -> str:
    rows = [row for row in layer.damping if (row.approximation, row.form) == (found.approximation, found.form)]
    return strip(rows, found, ascii_only=page.ascii_only) or page.dash


def _safe(row: RangeRow) -> str:
    """The safe range in words."""
    low, high = not math.isnan(row.low), not math.isnan(row.high)
    if row.status != "ok":
        return "not assessed"
    if row.low > row.high or (low and not high and "no damping of the grid is large enough" in row.reason):
        return "none"
    if low and high:
        return f"{number(row.low)} to {number(row.high)}"
    return f"from {number(row.low)}" if low else f"up to {number(row.high)}" if high else "all"
