"""The page of one layer: its findings, all approximations, all spectra, a picture of them, the factors."""

from __future__ import annotations

import math

from rich.panel import Panel
from rich.table import Table

from curvscope.present.names import shorten
from curvscope.present.numbers import count, percent, whole_percent
from curvscope.present.sparkline import picture
from curvscope.present.terminal.damping import layer_section
from curvscope.present.terminal.head import block_name
from curvscope.present.terminal.page import STATUS_WORDS, Column, Page
from curvscope.present.terminal.stability import stability_of_layer
from curvscope.present.terminal.twins import same, title, without_twins
from curvscope.records import ErrorRow, Layer, Run, SpectrumRow

ERROR_COLUMNS = (
    ("rel_frobenius", "rel.\nFrobenius", 9),
    ("cosine", "\ncosine", 7),
    ("trace_ratio", "trace\nratio", 8),
    ("rel_spectral", "rel.\nspectral", 6),
)
SPECTRUM_COLUMNS = (
    ("trace", "\ntrace", 6),
    ("lambda_max", "largest\neigenv.", 9),
    ("lambda_min_positive", "smallest\npositive", 4),
    ("condition", "\ncondition", 8),
    ("stable_rank", "stable\nrank", 3),
    ("effective_rank", "effective\nrank", 5),
)
RATIOS = ("cosine", "trace_ratio")
PICTURE_HEIGHT = 8
FLAVOURS = ("expand", "reduce")
# Dumped arrays by the file's names for them.
KEPT = ("columns", "block", "eigenvectors")


def layer_page(page: Page, run: Run, layer: Layer) -> None:
    """Print everything the run has about one layer."""
    page.console.print(_header(page, run, layer))
    rows = [row for row in run.tables["findings"] if row.layer == layer.name]
    if rows:
        page.heading("findings")
        page.findings(rows, name_layer=False)
    _errors(page, run, layer)
    _spectra(page, run, layer)
    stability_of_layer(page, run, layer.name)
    _picture(page, run, layer)
    layer_section(page, layer)
    _factors(page, layer)
    _next(page, run, layer)


def _header(page: Page, run: Run, layer: Layer) -> Panel:
    row = layer.row
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    bias = "with bias" if row.bias else "without bias"
    groups = f", {row.groups} groups" if row.groups > 1 else ""
    noun = "position" if row.positions == 1 else "positions"
    positions = f"{count(row.examples, 'example')}, {row.positions:,.4g} {noun} each"
    roles = list(dict.fromkeys(factors.role for factors in layer.factors.values() if factors.role))
    if roles:
        positions += ", those of all roles together"
    if row.padded > 0:
        positions += f" (and {percent(row.padded)} of the rows are padding, left out)"
    if row.columns:
        positions += f", {count(row.columns, f'{block_name(run)} column')}"
    shape = f"{row.d_out}{page.times}{row.d_in} {bias}{groups}" if layer.factors else "exact block only"
    grid.add_row("layer", page.text(f"{row.kind}, {shape}, {count(row.parameters, 'parameter')}"))
    if roles:
        words = f"{' and '.join(roles)}: one weight, factors for each role, the block of both together"
        grid.add_row("roles", page.text(words))
    grid.add_row("batch", page.text(positions))
    if layer.tokens is not None:
        rest = "the rest has no curvature" if len(roles) < 2 else "the rest only what its other role gives it"
        unseen = f"; {rest}" if _vocabulary(layer) > len(layer.tokens) else ""
        words = f"{len(layer.tokens):,} of {_vocabulary(layer):,} occur in the batch{unseen}"
        grid.add_row("tokens", page.text(words))
    if row.better_flavour in FLAVOURS:
        grid.add_row("better", page.text(f"K-FAC-{row.better_flavour}", "bold"))
    elif row.better_flavour == "same":
        why = " (one position)" if row.positions == 1 else ""
        grid.add_row("better", page.text(f"neither: expand and reduce are the same{why}"))
    elif row.better_flavour == "undecided":
        grid.add_row("better", page.text("undecided: the error bar of their difference reaches 0"))
    if row.reason:
        grid.add_row(STATUS_WORDS.get(row.status, row.status), page.text(row.reason, "yellow"))
    (name,) = shorten([page.safe(layer.name)], max(10, page.width - 8), page.ellipsis)
    return Panel(grid, title=page.text(name, "bold"), title_align="left", border_style="cyan")


def _vocabulary(layer: Layer) -> int:
    """The rows of an embedding: the length of its diagonal A."""
    lengths = [len(factors.A) for factors in layer.factors.values() if factors.A.ndim == 1]
    return lengths[0] if lengths else layer.row.d_in


def _errors(page: Page, run: Run, layer: Layer) -> None:
    """All approximations against the block."""
    rows = list(layer.errors.values())
    if not rows:
        return
    drawn = any(row.status == "estimated" for row in rows)
    exact = "estimates" if drawn else "the exact block" if run.info.fisher != "empirical" else block_name(run)
    page.heading(f"approximations against {exact}")
    better = f"kfac_{layer.row.better_flavour}"
    rows = without_twins(layer, rows)
    names = [(title(layer, row.approximation) + ("*" if row.approximation == better else ""), "") for row in rows]
    columns = [Column("\napproximation", names, worth=100, left=True)]
    columns += _measured(page, rows, ERROR_COLUMNS)
    if page.width >= 60:
        columns.append(Column("\nstatus", [_status(row) for row in rows], worth=1, left=True))
    page.table(columns)
    page.lines([page.text("rel.: ||G - M|| / ||G||; 0 is exact, 1 is as far off as M = 0. * the better K-FAC.", "dim")])
    _reasons(page, rows)
    _sources(page, layer)


def _sources(page: Page, layer: Layer) -> None:
    """What each K-FAC's error comes from, a line each; one line for both where they agree or are not known."""
    lines: dict[str, list[str]] = {}
    for name, row in layer.sources.items():
        if same(layer) and name.endswith("_reduce"):
            continue
        if row.status == "ok":
            spread, mean, cross = (whole_percent(share) for share in (row.spread, row.mean, row.cross))
            words = f"deviation from the inputs' mean {spread}, the mean {mean}"
            words += f", positions adding up {cross}" if layer.row.positions != 1 else ""
        else:
            words = f"{STATUS_WORDS.get(row.status, row.status)}, {row.reason}"
        lines.setdefault(words, []).append(name)
    found = [
        page.text(f"{', '.join(title(layer, name) for name in names)}'s error comes from: {words}", "dim")
        for words, names in lines.items()
    ]
    page.lines(found)


def _spectra(page: Page, run: Run, layer: Layer) -> None:
    """Derived numbers of each spectrum."""
    rows = list(layer.spectra.values())
    if not rows:
        return
    page.heading("spectra")
    order = ["ggn", *layer.errors]
    rows.sort(key=lambda row: order.index(row.approximation) if row.approximation in order else len(order))
    words = "empirical" if run.info.fisher == "empirical" else "ggn"
    rows = without_twins(layer, rows)
    names = [(words, "bold") if row.approximation == "ggn" else (title(layer, row.approximation), "") for row in rows]
    page.table(
        [Column("\nmatrix", names, worth=100, left=True), *_measured(page, rows, SPECTRUM_COLUMNS)],
    )
    _reasons(page, rows)


def _measured(
    page: Page, rows: list[ErrorRow] | list[SpectrumRow], wanted: tuple[tuple[str, str, int], ...]
) -> list[Column]:
    """Columns of measured values with their standard errors."""
    columns = []
    for name, header, worth in wanted:
        shown = page.ratio if name in RATIOS else page.measured
        cells = [
            shown(getattr(row, name), getattr(row, f"{name}_stderr"), estimated=row.status == "estimated")
            for row in rows
        ]
        columns.append(Column(header, [(cell, "dim" if cell == page.dash else "") for cell in cells], worth))
    return columns


def _status(row: ErrorRow) -> tuple[str, str]:
    if row.status == "ok":
        return row.fisher, "dim"
    return STATUS_WORDS.get(row.status, row.status), "dim" if row.status == "estimated" else "yellow"


def _reasons(page: Page, rows: list[ErrorRow] | list[SpectrumRow]) -> None:
    """The reason of each row that has one, rows of the same reason together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.reason:
            reasons.setdefault((row.status, row.reason), []).append(row.approximation)
    lines = []
    for (status, reason), names in reasons.items():
        who = "all" if len(names) == len(rows) > 1 else ", ".join(names)
        line = page.text(f"{page.dash} {who} {STATUS_WORDS.get(status, status)}: ", "" if status == "ok" else "yellow")
        line.append(page.safe(reason), style="dim")
        lines.append(line)
    page.lines(lines)


def _picture(page: Page, run: Run, layer: Layer) -> None:
    """The block's eigenvalues over rank, with the better K-FAC's over them."""
    if "ggn" not in layer.spectrum or not len(layer.spectrum["ggn"]):
        return
    other = f"kfac_{layer.row.better_flavour if layer.row.better_flavour in FLAVOURS else 'expand'}"
    drawn = picture(
        layer.spectrum["ggn"],
        layer.spectrum.get(other),
        width=max(10, min(100, page.width - 12)),
        height=PICTURE_HEIGHT,
        ascii_only=page.ascii_only,
    )
    if not drawn.rows:
        return
    page.heading("eigenvalues over rank")
    bar = "|" if page.ascii_only else "┤"
    for label, cells in drawn.rows:
        line = page.text(f"{label:>7} {bar}", "dim")
        line.append(cells, style="cyan")
        page.console.print(line, no_wrap=True, overflow="crop", highlight=False)
    page.console.print(page.text(" " * 9 + drawn.axis, "dim"), no_wrap=True, overflow="crop", highlight=False)
    words = f"filled: the block of the {block_name(run)}"
    if other in layer.spectrum:
        dot = "o" if page.ascii_only else "•"
        beyond = len(layer.spectrum[other]) - len(layer.spectrum["ggn"])
        words += f"; {dot} {other}" + (f", which has {beyond:,} more nonzero eigenvalues" if beyond > 0 else "")
    page.lines([page.text(words, "dim")])


def _factors(page: Page, layer: Layer) -> None:
    """Shape and extreme eigenvalues of each factor, and which arrays the run keeps."""
    table: list[tuple[str, str, str, str]] = []
    for key, factors in layer.factors.items():
        if same(layer) and key.startswith("reduce"):
            continue
        for side, values in (("A", factors.A), ("B", factors.B)):
            shape = page.times.join(str(size) for size in values.shape)
            words = [_attribute(page, layer, f"{key}/{side}", name) for name in ("lambda_max", "lambda_min")]
            flavours = key.replace("expand", "expand = reduce", 1) if same(layer) else key
            table.append((f"{flavours} {side}", f"{shape} {values.dtype}", words[0], words[1]))
    kept = [name for name in KEPT if _has(layer, name)]
    facts = [
        f"{name}: {value}"
        for name, value in sorted(layer.attributes.items())
        if isinstance(value, str) and value and "/" not in name
    ]
    if table or kept or facts:
        page.heading("factors and arrays" if table else "arrays")
    if table:
        headers = (
            ("\nfactor", True, 9),
            ("\nshape", True, 5),
            ("largest\neigenv.", False, 7),
            ("smallest\neigenv.", False, 6),
        )
        page.table(
            [
                Column(header, [(row[index], "") for row in table], worth, left)
                for index, (header, left, worth) in enumerate(headers)
            ]
        )
    lines = [*facts, f"also kept: {', '.join(kept)}" if kept else ""]
    page.lines([page.text(line, "dim") for line in lines if line])


def _attribute(page: Page, layer: Layer, factor: str, name: str) -> str:
    """A fact of a factor, with its error where it is made of draws; marked where it has none."""
    value, stderr = (layer.attributes.get(f"{factor}/{name}{end}", math.nan) for end in ("", "_stderr"))
    return page.measured(float(value), float(stderr), estimated=f"{factor}/draws" in layer.attributes)


def _has(layer: Layer, name: str) -> bool:
    if name == "eigenvectors":
        return len(layer.eigenvectors) > 0
    return (layer.kept_columns if name == "columns" else layer.block) is not None


def _next(page: Page, run: Run, layer: Layer) -> None:
    """The next layer's page, and the arrays for one's own tools."""
    page.heading("next")
    names = list(run.layers)
    following = names[(names.index(layer.name) + 1) % len(names)]
    if page.path is None:
        key = next(iter(layer.factors), "expand")
        call = f'  run.layers[{layer.name!r}].factors["{key}"].A    run.show({following!r})'
        page.console.print(page.text(call, "bold cyan"), soft_wrap=True, highlight=False)
        return
    if following != layer.name:
        page.command("curvscope", "show", page.path, following)
    page.command("curvscope", "export", page.path, "--to", "npz")
