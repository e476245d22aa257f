"""The report on stability: the optimizer, the network's sharpness against its threshold, the layers that carry it."""

from __future__ import annotations

import math

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from curvscope.present.names import shorten
from curvscope.present.numbers import count, number, percent, with_stderr
from curvscope.present.terminal.page import STATUS_WORDS, Column, Page
from curvscope.records import Run, StabilityRow

LAYERS_SHOWN = 5
LEAST_SHARE = 0.05
VERDICT_STYLES = {"above": "bold red", "below": "green", "undecided": "bold yellow", "not_assessed": "dim"}
SHARPNESS = ("preconditioned_sharpness", "hessian_top")
SHARES = (
    *("direction_share", "dead_inputs", "dead_outputs", "dead_units", "saturated_units", "mean_share", "eps_share"),
    *("example_share", "position_share", "wrong_and_certain", "unresolved_A", "unresolved_B"),
)
VERDICT_WORDS = {"not_assessed": "not assessed"}
QUANTITY_WORDS = {
    "hessian_top": "sharpness (largest eigenvalue of the Hessian)",
    "hessian_bottom": "most negative eigenvalue of the Hessian",
    "ggn_top": "largest eigenvalue of the GGN",
    "preconditioned_sharpness": "sharpness as the optimizer sees it",
    "next_sharpness": "sharpness once v has taken this gradient in",
    "growth_factor": "growth a step along the top direction",
    "largest_stable_lr": "largest stable learning rate",
    "clip_scale": "length of the clipped step, of the full one",
    "clipped_sharpness": "sharpness against the threshold with clipping",
    "clipped_growth": "growth a step along the top direction with clipping",
    "clipped_stable_lr": "largest stable learning rate with clipping",
    "scheduled_peak_lr": "learning rate at the schedule's tightest step",
    "direction_share": "share of the top direction",
    "update_rms": "gradient over its second moment, RMS of g / sqrt(v)",
    "update_ratio": "next step over weights",
    "eps_share": "entries where eps is larger than sqrt(v)",
    "beta1_over_root_beta2": "beta1 / sqrt(beta2)",
    "early_moments": "growth of P to come, 1 / (1 - beta1^t)",
    "learning_rate_ratio": "learning rate over the layers' median",
    "gradient_noise": "gradient noise tr Sigma, against N |G|^2",
    "gradient_signal": "gradient signal |G|^2, without noise",
    "dead_inputs": "inputs that are always zero",
    "dead_outputs": "outputs that no curvature reaches",
    "mean_share": "the mean's share of the inputs' energy",
    "condition_A": "condition of A",
    "condition_B": "condition of B",
    "unresolved_A": "share of A's eigenvalues lost to rounding",
    "unresolved_B": "share of B's eigenvalues lost to rounding",
    "kronecker_limit": "nearest Kronecker product's error over K-FAC's",
    "example_share": "largest share of one example in the top curvature",
    "position_share": "largest share of one position",
    "input_scale": "RMS of the inputs",
    "odd_example": "largest example over the median one",
    "weight_scale": "norm of the weight's rows, RMS",
    "recurrent_radius": "spectral radius",
    "signal_drift": "change of the signals' size, first layer to last",
    "normalisations": "normalisations",
    "attention_logit": "largest attention logit",
    "attention_collapse": "attention: 1 - entropy / log(keys)",
    "saturated_units": "saturated values of its units",
    "dead_units": "dead units",
    "logit_gap": "median gap between the two largest logits",
    "wrong_and_certain": "terms certain of a wrong class",
}


def stability_section(page: Page, run: Run) -> None:
    """Print optimizer, sharpness with its verdict, and the layers that carry the top direction."""
    rows = run.tables.get("stability", [])
    network = {row.quantity: row for row in rows if row.scope == "network"}
    if not network:
        return
    page.heading("stability")
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("optimizer", page.text(run.model.optimizer or "not known"))
    governs = network.get("preconditioned_sharpness")
    if "hessian_top" in network:
        plain = f"{_value(network['hessian_top'])} Hessian"
        if "ggn_top" in network:
            plain += f", {_value(network['ggn_top'])} GGN"
        grid.add_row("sharpness", page.text(plain))
    if governs is not None:
        grid.add_row("verdict", _verdict(page, run, governs))
    growth, rate = network.get("growth_factor"), network.get("largest_stable_lr")
    if growth is not None and not math.isnan(growth.value):
        words = f"{number(growth.value)} times a step along the top direction"
        if growth.reason:
            words += f", {growth.reason}"
        if rate is not None and math.isfinite(rate.value):
            words += f"; stable up to a learning rate of {_value(rate)}"
        grid.add_row("growth", page.text(words))
    for title, line in (("clipping", _clipping(page, network)), ("schedule", _schedule(page, network))):
        if line is not None:
            grid.add_row(title, line)
    noise = _noise(page, run, network)
    if noise is not None:
        grid.add_row("gradient", noise)
    page.console.print(Padding(grid, (0, 0, 0, 1)))
    _layers(page, rows)
    if governs is not None and governs.verdict != "not_assessed":
        page.lines([page.text(governs.reason[:1].upper() + governs.reason[1:] + ".", "dim")] if governs.reason else [])


def stability_of_layer(page: Page, run: Run, layer: str) -> None:
    """Print all of one layer's rows."""
    rows = [row for row in run.tables.get("stability", []) if row.layer == layer]
    if not rows:
        return
    page.heading("stability")
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", overflow="fold")
    grid.add_column(overflow="fold")
    unknown: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        title = QUANTITY_WORDS.get(row.quantity, row.quantity)
        if math.isnan(row.value):
            unknown.setdefault((row.status, row.reason), []).append(title)
            continue
        line = page.text(percent(row.value) if row.quantity in SHARES else _value(row))
        if not math.isnan(row.threshold):
            limit = percent(row.threshold) if row.quantity in SHARES else number(row.threshold)
            line.append(page.safe(f", threshold {limit}: "))
            line.append(VERDICT_WORDS.get(row.verdict, row.verdict), style=VERDICT_STYLES.get(row.verdict, ""))
        if row.reason:
            said = STATUS_WORDS.get(row.status, row.status)
            line.append(page.safe(f" ({said + ': ' if row.status != 'ok' else ''}{row.reason})"), style="dim")
        grid.add_row(page.text(title), line)
    page.console.print(Padding(grid, (0, 0, 0, 1)))
    lines = []
    for (status, reason), titles in unknown.items():
        line = page.text(f"{page.dash} {STATUS_WORDS.get(status, status)}: ", "yellow")
        line.append(page.safe("; ".join(titles) + (f" ({reason})" if reason else "")), style="dim")
        lines.append(line)
    page.lines(lines)


def _noise(page: Page, run: Run, network: dict[str, StabilityRow]) -> Text | None:
    """Both parts of the gradient noise scale, against the batch size."""
    noise, signal = network.get("gradient_noise"), network.get("gradient_signal")
    if noise is None or signal is None or math.isnan(noise.value):
        return None
    words = f"noise tr Sigma {number(noise.value)}, signal |G|^2 {number(signal.value)}: "
    if signal.value <= 0:
        return page.text(words + f"no signal stands out of the noise of {count(run.model.examples, 'example')}")
    return page.text(words + f"equal in a batch of about {number(noise.value / signal.value)}")


def _clipping(page: Page, network: dict[str, StabilityRow]) -> Text | None:
    """What clipping by norm does to this step, and the verdict with it."""
    scale, row = network.get("clip_scale"), network.get("clipped_sharpness")
    if scale is None:
        return None
    if row is None:
        return page.text(f"does not act: {scale.reason}")
    growth, rate = network.get("clipped_growth"), network.get("clipped_stable_lr")
    line = page.text(f"step {number(scale.value)} times as long: {scale.reason}; ")
    line.append(page.safe(row.verdict), style=VERDICT_STYLES.get(row.verdict, ""))
    words = f": {_value(row)} against {number(row.threshold)}"
    if growth is not None:
        words += f", growth {number(growth.value)}"
    if rate is not None and math.isfinite(rate.value):
        words += f", stable up to {number(rate.value)}"
    line.append(page.safe(f"{words}; {row.reason}"), style="not bold default")
    return line


def _schedule(page: Page, network: dict[str, StabilityRow]) -> Text | None:
    """The rates ahead against what is stable today."""
    row = network.get("scheduled_peak_lr")
    if row is None:
        return None
    if math.isnan(row.value):
        return page.text(f"not assessed: {row.reason}", "yellow")
    line = page.text(f"learning rate {number(row.value)} at its tightest step, ")
    line.append(page.safe(row.verdict), style=VERDICT_STYLES.get(row.verdict, ""))
    line.append(page.safe(f" what is stable today ({number(row.threshold)}); {row.reason}"), style="not bold default")
    return line


def _verdict(page: Page, run: Run, row: StabilityRow) -> Text:
    """The verdict in a sentence with value, spread, threshold and batch size."""
    if row.verdict == "not_assessed":
        return page.text(f"not assessed: {row.reason}", "yellow")
    line = page.text(row.verdict, VERDICT_STYLES.get(row.verdict, ""))
    words = f": {_value(row)} against {number(row.threshold)} ({row.source.partition(',')[0]}), "
    if row.status == "ok" and math.isfinite(row.threshold) and row.threshold > 0 and row.value > 0:
        words += f"{number(row.value / row.threshold)} of it, "
    words += f"on {count(run.model.examples, 'example')}"
    line.append(page.safe(words + (" and halves of them" if not math.isnan(row.low) else "")), style="not bold default")
    return line


def _value(row: StabilityRow) -> str:
    """The value with its standard error, or its spread over the halves."""
    if not math.isnan(row.value_stderr):
        return with_stderr(row.value, row.value_stderr)
    spread = "" if math.isnan(row.low) else f" ({number(row.low)} to {number(row.high)})"
    return f"{number(row.value)}{spread}{' at least' if row.status == 'not_converged' else ''}"


def _layers(page: Page, rows: list[StabilityRow]) -> None:
    """The layers that hold most of the top direction, each with its own block where that was measured."""
    shares = {row.layer: row.value for row in rows if row.quantity == "direction_share"}
    blocks = {row.layer: row for row in rows if row.scope == "layer" and row.quantity in SHARPNESS}
    order = sorted(shares, key=lambda name: (blocks.get(name, rows[0]).verdict != "above", -shares[name]))
    shown = [name for index, name in enumerate(order) if index == 0 or shares[name] >= LEAST_SHARE][:LAYERS_SHOWN]
    if not shown:
        return
    longest = max(len(page.safe(name)) for name in shown)
    short = shorten([page.safe(name) for name in shown], max(10, min(longest, page.width - 40)), page.ellipsis)
    cells: list[tuple[str, str]] = []
    verdicts: list[tuple[str, str]] = []
    decays: list[str] = []
    for name in shown:
        block = blocks.get(name)
        known = block is not None and not math.isnan(block.value)
        cells.append((_value(block) if block is not None and known else page.dash, "" if known else "dim"))
        said = block.verdict if block is not None and block.verdict != "not_assessed" else ""
        if block is not None and "is weight decay" in block.reason:
            decays.append(f"{name}: {block.reason.partition(';')[0]}.")
        verdicts.append((said or page.dash, VERDICT_STYLES.get(said, "dim")))
    page.table(
        [
            Column("\nlayer", [(name, "") for name in short], worth=100, left=True),
            Column("share of the\ntop direction", [(percent(shares[name]), "") for name in shown], worth=9),
            Column("its own block\n(spread)", cells, worth=8),
            Column("\nalone", verdicts, worth=7, left=True),
        ]
    )
    page.lines([page.text(words, "dim") for words in decays])
