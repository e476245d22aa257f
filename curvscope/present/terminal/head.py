"""The report's head: what was analyzed, what the numbers stand for, and the verdict, at a glance."""

from __future__ import annotations

from pathlib import PurePath

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from curvscope.present.names import spoken
from curvscope.present.numbers import count, number, percent
from curvscope.present.terminal.page import SEVERITY_STYLES, Page, titled
from curvscope.records import Layer, Run, RunInfo

TREATMENT_WORDS = {
    "exact_only": "exact block only",
    "uncovered": "not covered",
    "frozen": "frozen",
}
FISHER_WORDS = {
    "exact": "exact GGN",
    "probe": "GGN estimated from {samples}",
    "mc": "GGN estimated from {samples}",
    "empirical": "empirical Fisher, which is another matrix than the GGN",
}
SAMPLE_WORDS = {"probe": ("probe", ""), "mc": ("drawn label an example", "drawn labels an example")}


def block_name(run: Run, *, short: bool = False) -> str:
    """What the blocks are blocks of."""
    if run.info.fisher == "empirical":
        return "Fisher" if short else "empirical Fisher"
    return "GGN"


def kronecker_layers(run: Run) -> dict[str, Layer]:
    """The layers that have Kronecker factors; the others have a block alone, and no row in the table."""
    alone = {row.layer for row in run.tables["coverage"] if row.treatment == "exact_only"}
    return {name: layer for name, layer in run.layers.items() if name not in alone}


def _shares(run: Run) -> dict[str, float]:
    """Treatment to its share of the trainable parameters."""
    counts: dict[str, int] = {}
    for row in run.tables["coverage"]:
        if row.treatment != "frozen":
            counts[row.treatment] = counts.get(row.treatment, 0) + row.count
    total = sum(counts.values())
    return {treatment: entries / total for treatment, entries in counts.items() if entries}


def head(page: Page, run: Run) -> Panel:
    """Model, loss, coverage and what the numbers stand for, at a glance."""
    model, info = run.model, run.info
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    covered = page.text(percent(model.coverage), "bold green" if model.coverage >= 0.9 else "bold yellow")
    covered.append(page.safe(" Kronecker"), style="not bold default")
    shares = _shares(run)
    for treatment in ("exact_only", "uncovered"):
        if treatment in shares:
            share = f", {percent(shares[treatment])} {TREATMENT_WORDS[treatment]}"
            covered.append(page.safe(share), style="not bold default")
    covered.append(page.safe(" (of the trainable parameters)"), style="not bold dim default")
    step = f", step {model.step:,}" if model.step >= 0 else ""
    lines = {
        "verdict": _verdict(page, run),
        "coverage": covered,
        "model": page.text(f"{model.name}, {count(model.parameters, 'parameter')}{step}"),
        "batch": page.text(f"{count(model.examples, 'example')}, outputs {model.outputs}"),
        "loss": page.text(f"{number(model.loss, 4)} {model.loss_name}, gradient norm {number(model.gradient_norm)}"),
        "curvature": page.text(f"{_fisher_words(run)}, {info.dtype} on {info.device}{_stored(info)}"),
        "mode": page.text("eval mode" + (f": {model.mode_note}" if model.mode_note else "")),
    }
    if model.graph != "exported":
        lines["graph"] = page.text(model.graph)
    for label, words in lines.items():
        grid.add_row(label, words)
    title = page.text(f"curvscope {page.dash} {PurePath(model.checkpoint).name or model.name}", "bold")
    made = page.text(f"curvscope {info.curvscope_version}, {info.created[:16].replace('T', ' ')}", "dim")
    return Panel(grid, title=title, title_align="left", subtitle=made, subtitle_align="right", border_style="cyan")


def _stored(info: RunInfo) -> str:
    """The dtype of the stored weights, where that is not the run's."""
    return f", weights stored as {info.source_dtype}" if info.source_dtype else ""


def _verdict(page: Page, run: Run) -> Text:
    """The first root cause by code, title and layer, and how many more; without any, where stability stands."""
    roots = [row for row in run.tables["findings"] if not row.caused_by and row.severity != "info"]
    if roots:
        first, more = roots[0], len(roots) - 1
        line = page.text(first.severity.upper(), SEVERITY_STYLES[first.severity])
        said = f" {titled(first.code, first.title)}" + (f" in {spoken(first.layer)}" if first.layer else "")
        line.append(page.safe(said), style="not bold default")
        rest = f"; {count(more, 'more root cause')}" if more else ""
        line.append(f"{rest}; evidence and remedy are at the end", style="not bold dim default")
        return line
    line = page.text("no warnings", "bold green")
    line.append(page.safe(_where_stability_stands(run)), style="not bold default")
    return line


def _where_stability_stands(run: Run) -> str:
    rows = run.tables.get("stability", [])
    row = next((row for row in rows if row.scope == "network" and row.quantity == "preconditioned_sharpness"), None)
    if row is None or row.verdict == "not_assessed" or row.status != "ok":
        return "; stability not assessed"
    return f"; sharpness {number(row.value / row.threshold)} of its threshold ({row.verdict})"


def _fisher_words(run: Run) -> str:
    """What was exact and what was estimated, with how many layers where they differ."""
    per_layer: dict[str, int] = {}
    layers = kronecker_layers(run)
    for layer in layers.values():
        row = layer.errors.get("kfac_expand")
        key = "" if row is None or layer.row.status == "not_assessed" else row.fisher
        per_layer[key] = per_layer.get(key, 0) + 1
    if per_layer and set(per_layer) == {""}:
        return f"no layer's {block_name(run)} block is assessed"
    if not per_layer:
        per_layer = {run.info.fisher: 0}
    words = []
    for fisher, concerned in sorted(per_layer.items(), key=lambda item: -item[1]):
        if fisher:
            samples = count(run.info.samples, *SAMPLE_WORDS.get(fisher, ("sample", "")))
            said = FISHER_WORDS.get(fisher, fisher).format(samples=samples)
            words.append(said if len(per_layer) == 1 else f"{said} ({count(concerned, 'layer')})")
    if "" in per_layer and len(per_layer) > 1:
        words.append(f"{count(per_layer[''], 'layer')} not assessed")
    return ", ".join(words)
