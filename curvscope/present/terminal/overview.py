"""The report's first page: what was analyzed, a row a layer, what is left out, what deserves a look."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from rich.padding import Padding
from rich.table import Table

from curvscope.present.names import shorten, some
from curvscope.present.numbers import count, number, percent
from curvscope.present.sparkline import sparkline
from curvscope.present.terminal.damping import overview_section
from curvscope.present.terminal.findings import findings_section
from curvscope.present.terminal.head import TREATMENT_WORDS, block_name, head, kronecker_layers
from curvscope.present.terminal.page import GAP, STATUS_WORDS, Column, Page
from curvscope.present.terminal.stability import stability_section
from curvscope.present.terminal.steps import steps_section
from curvscope.records import CoverageRow, ErrorRow, Layer, Run

FLAVOURS = ("expand", "reduce")
SPARKLINE_WIDTHS = (32, 28, 24, 20, 16, 12, 8)


def overview(page: Page, run: Run) -> None:
    """Print the whole first page."""
    page.console.print(head(page, run))
    layers = kronecker_layers(run)
    page.heading(f"{count(len(layers), 'layer')}, in forward order")
    left_out = _layer_table(page, run, list(layers.values()))
    _legend(page, run, layers, left_out)
    _not_assessed(page, run, layers)
    overview_section(page, list(layers.values()), run.model.optimizer, run.tables.get("global_damping", []))
    stability_section(page, run)
    _coverage(page, run)
    steps_section(page, run)
    findings_section(page, run, layers)
    _notes(page, run)
    _next(page, run)


def _layer_table(page: Page, run: Run, layers: list[Layer]) -> list[str]:
    """One row a layer; names and columns give way as the width shrinks. The headers of those that did."""
    if not layers:
        return []
    matrix = block_name(run, short=True)
    names = [page.safe(layer.name) for layer in layers]
    longest = max(len(name) for name in names)
    columns = _layer_columns(page, layers, matrix)
    least = 16 if page.width >= 120 else 8
    drawn = any(len(layer.spectrum.get("ggn", ())) for layer in layers)
    widths = [width for width in SPARKLINE_WIDTHS if width >= least] if drawn else []
    spectra = [_spectrum_column(page, layers, width, matrix) for width in widths]
    chosen = [*columns, *spectra[-1:]]
    room = page.width - 2 - GAP - min(longest, max(18, page.width // 4))
    chosen = page.fitting(chosen, room)
    name_width = max(10, min(longest, page.width - 2 - GAP - page.needed(chosen)))
    short = shorten(names, name_width, page.ellipsis)
    name = Column("layer", [(words, "") for words in short], worth=100, left=True)
    # What the names leave over goes to the spectrum.
    if spectra and chosen and chosen[-1] is spectra[-1]:
        wider = [[name, *chosen[:-1], spectrum] for spectrum in spectra]
        chosen = next((c for c in wider if page.needed(c) <= page.width - 2), [name, *chosen])[1:]
    page.table([name, *chosen])
    missing = drawn and not any(spectrum in chosen for spectrum in spectra)
    return page.left_out(columns, chosen) + ([f"{matrix} spectrum"] if missing else [])


def _layer_columns(page: Page, layers: list[Layer], matrix: str) -> list[Column]:
    """All columns but name and spectrum, from left to right; no condition where that of no block is known."""

    def column(header: str, worth: int, cell: Callable[[Layer], tuple[str, str]], left: bool = False) -> Column:
        return Column(header, [cell(layer) for layer in layers], worth, left)

    columns = [
        column("kind", 1, lambda layer: (layer.row.kind, "dim"), left=True),
        column(f"out{page.times}in", 5, lambda layer: (_shape(page, layer), "")),
        column("posi-\ntions", 4, lambda layer: (_positions(layer), "dim")),
    ]
    flavours = {"expand": "K-FAC"} if _one_flavour(layers) else {flavour: flavour for flavour in FLAVOURS}
    for flavour, title in flavours.items():
        columns.append(column(f"error\n{title} ", 10, lambda layer, f=flavour: _error(page, layer, f)))  # type: ignore[misc]
    for flavour, title in flavours.items():
        columns.append(column(f"trace\n{title}", 2, lambda layer, f=flavour: _trace_ratio(page, layer, f)))  # type: ignore[misc]
    condition = column(f"{matrix}\ncond.", 6, lambda layer: _condition(page, layer))
    return [*columns, condition] if any(words != page.dash for words, _ in condition.cells) else columns


def _one_flavour(layers: Collection[Layer]) -> bool:
    """Whether expand and reduce are the same matrix in every layer."""
    return all(layer.row.better_flavour == "same" for layer in layers)


def _shape(page: Page, layer: Layer) -> str:
    row = layer.row
    if row.groups > 1:
        return f"{row.groups}{page.group_mark}{row.d_out // row.groups}{page.times}{row.d_in}"
    return f"{row.d_out}{page.times}{row.d_in}"


def _positions(layer: Layer) -> str:
    positions = layer.row.positions
    return f"{positions:,.0f}" if positions == round(positions) else f"{positions:,.1f}"


def _error(page: Page, layer: Layer, flavour: str) -> tuple[str, str]:
    """The relative error; the better flavour carries a star and is bold."""
    row = layer.errors.get(f"kfac_{flavour}")
    words = _value(page, row, "rel_frobenius")
    if words == page.dash or row is None:
        return f"{page.dash} ", "dim"
    better = layer.row.better_flavour == flavour
    style = "green" if row.rel_frobenius < 0.3 else "red" if row.rel_frobenius >= 0.9 else "yellow"
    return words + ("*" if better else " "), f"bold {style}" if better else style


def _trace_ratio(page: Page, layer: Layer, flavour: str) -> tuple[str, str]:
    words = _value(page, layer.errors.get(f"kfac_{flavour}"), "trace_ratio")
    return words, "dim" if words == page.dash else ""


def _value(page: Page, row: ErrorRow | None, column: str) -> str:
    if row is None:
        return page.dash
    shown = page.ratio if column == "trace_ratio" else page.measured
    return shown(getattr(row, column), getattr(row, f"{column}_stderr"))


def _condition(page: Page, layer: Layer) -> tuple[str, str]:
    row = layer.spectra.get("ggn")
    return (page.dash, "dim") if row is None else (page.measured(row.condition, row.condition_stderr), "")


def _spectrum_column(page: Page, layers: list[Layer], width: int, matrix: str) -> Column:
    cells = []
    for layer in layers:
        line = sparkline(layer.spectrum["ggn"], width, ascii_only=page.ascii_only) if "ggn" in layer.spectrum else ""
        cells.append((line or page.dash, "cyan" if line else "dim"))
    return Column(f"{matrix}\nspectrum", cells, worth=7, left=True)


def _legend(page: Page, run: Run, layers: dict[str, Layer], left_out: list[str]) -> None:
    """What the columns mean, in as few words as do, and which found no room."""
    words = [
        "error: relative Frobenius error of K-FAC against the block; 0 is exact, 1 is as far off as zero; "
        + (
            "expand = reduce, as every layer has one position."
            if _one_flavour(layers.values())
            else "* the better flavour."
        ),
    ]
    if any(len(layer.spectrum.get("ggn", ())) for layer in layers.values()):
        matrix = block_name(run, short=True)
        words.append(f"{matrix} spectrum: log eigenvalue over rank, one step down is a factor of 10.")
    grouped = next((layer for layer in layers.values() if layer.row.groups > 1), None)
    if grouped is not None:
        row = grouped.row
        size = f"{row.d_out // row.groups}{page.times}{row.d_in}"
        words.append(f"{_shape(page, grouped)}: {row.groups} groups of {size} each.")
    if any(row.status == "estimated" and row.layer in layers for row in run.tables["errors"]):
        words.append("± estimated, with its standard error; * only where the error bars tell which is better.")
    if left_out:
        words.append(f"No room here for {', '.join(left_out)}: on the layers' pages, or in a wider terminal.")
    page.lines([page.text(line, "dim") for line in words])


def _not_assessed(page: Page, run: Run, layers: dict[str, Layer]) -> None:
    """Why values are missing: one line for each kind of gap, with how many layers it concerns."""
    gaps: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in (*run.tables["errors"], *run.tables["spectra"]):
        if row.layer in layers and row.status in ("skipped", "not_assessed", "not_converged"):
            reasons = gaps.setdefault((row.status, row.layer), {})
            reasons.setdefault(row.reason, [])
            if row.approximation not in reasons[row.reason]:
                reasons[row.reason].append(row.approximation)
    kinds: dict[tuple[str, tuple[str, ...]], dict[str, list[str]]] = {}
    for (status, layer), reasons in gaps.items():
        for reason, approximations in reasons.items():
            kinds.setdefault((status, tuple(approximations)), {}).setdefault(reason, []).append(layer)
    lines = []
    for (status, named), by_reason in kinds.items():
        every = "everything" if "ggn" in named else "the errors"
        what = every if len(named) > 5 else ", ".join(named)
        names = [layer for concerned in by_reason.values() for layer in concerned]
        line = page.text(f"{page.dash} {STATUS_WORDS[status]}: ", "yellow")
        line.append(page.safe(f"{what} of {some(names, 'layer', most=1)}: {next(iter(by_reason))}"), style="dim")
        if len(by_reason) > 1:
            line.append(f" (other reasons: {len(by_reason) - 1}, on the layers' pages)", style="dim")
        lines.append(line)
    page.lines(lines)


def _coverage(page: Page, run: Run) -> None:
    """Parameters without Kronecker factors, by treatment and reason, each with its share."""
    groups: dict[tuple[str, str], list[CoverageRow]] = {}
    for row in run.tables["coverage"]:
        if row.treatment != "kronecker" and not (row.treatment == "exact_only" and row.layer in run.layers):
            groups.setdefault((row.treatment, row.reason), []).append(row)
    alone = _exact_only(run)
    if not groups and not alone:
        return
    page.heading("parameters without Kronecker factors")
    total = sum(row.count for row in run.tables["coverage"])
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(overflow="fold")
    if alone:
        line = page.text(f"{TREATMENT_WORDS['exact_only']}: ", "bold")
        said = [f"{words} ({percent(entries / total)})" for words, entries in alone]
        line.append(page.safe(", ".join(said)), style="not bold default")
        grid.add_row(page.text(percent(sum(entries for _, entries in alone) / total)), line)
    for (treatment, reason), rows in sorted(groups.items(), key=lambda item: -sum(row.count for row in item[1])):
        entries = sum(row.count for row in rows)
        words = TREATMENT_WORDS.get(treatment, treatment)
        line = page.text(f"{words}: ", "bold red" if treatment == "uncovered" else "bold")
        names = [row.parameter for row in rows]
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        line.append(page.safe(", ".join(names[:2]) + more), style="not bold default")
        line.append(page.safe(f" ({reason})" if reason else ""), style="not bold dim default")
        grid.add_row(page.text(percent(entries / total)), line)
    page.console.print(Padding(grid, (0, 0, 0, 1)))


def _exact_only(run: Run) -> list[tuple[str, int]]:
    """The layers that have a block alone, those of a kind together: words for them, and their parameters."""
    layers: dict[str, int] = {}
    for row in run.tables["coverage"]:
        if row.treatment == "exact_only" and row.layer in run.layers:
            layers[row.layer] = layers.get(row.layer, 0) + row.count
    kinds: dict[str, list[str]] = {}
    for name in layers:
        kind = run.layers[name].row.kind
        kinds.setdefault("norm" if kind.endswith("_norm") else kind, []).append(name)
    found = []
    for kind, names in kinds.items():
        patterns = list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))
        listed = ", ".join(patterns[:2]) + (", ..." if len(patterns) > 2 else "")
        words = (
            (kind + " " if kind == "norm" and kind not in names[0] else "") + names[0]
            if len(names) == 1
            else f"{count(len(names), kind)} {listed}"
        )
        found.append((words, sum(layers[name] for name in names)))
    return sorted(found, key=lambda item: -item[1])


def _notes(page: Page, run: Run) -> None:
    """How the input was read, and where the time went."""
    lines = [page.text(note, "dim") for note in run.notes]
    if run.seconds:
        total = sum(run.seconds.values())
        spent = [f"{stage} {number(s, 2)} s" for stage, s in run.seconds.items() if s >= total / 100]
        lines.append(page.text(f"{number(total, 2)} s in all: {', '.join(spent)}.", "dim"))
    if lines:
        page.heading("notes")
        page.lines(lines)


def _next(page: Page, run: Run) -> None:
    """The command, or the call, that leads on from here."""
    named = [row.layer for row in run.tables["findings"] if row.layer in run.layers]
    layer = next(iter([*named, *run.layers]), None)
    if layer is None:
        return
    page.heading("next")
    if page.path is None:
        call = f'  run.show({layer!r})    run.save("run.h5")'
        page.console.print(page.text(call, "bold cyan"), soft_wrap=True, highlight=False)
    else:
        page.command("curvscope", "show", page.path, layer)
