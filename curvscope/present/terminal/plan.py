"""The plan of an analysis as a page: what runs, what it takes, and every layer's treatment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from curvscope.planned import PlannedLayer, PlannedRun
from curvscope.present.numbers import count

# The stages as the page calls them.
STAGES = {"measure": "measures"}
TREATMENTS = ("exact", "empirical", "estimated", "not_assessed")
BINARY = ("B", "KiB", "MiB", "GiB", "TiB")


def render_plan(planned: PlannedRun, console: Console) -> None:
    """Prints the page."""
    facts = {
        "model": f"{planned.name}, {planned.loss}",
        "data": f"{count(planned.examples, 'example')} in {_count(planned.batches, 'batch', 'batches')}, "
        f"up to {planned.piece_examples} a pass",
        "curvature": f"{planned.fisher}, {planned.columns} columns an example, {planned.dtype} on {planned.device}",
        "passes": f"{planned.backward_passes} backward passes in {_count(planned.sweeps, 'sweep', 'sweeps')}",
        "memory": f"about {size(planned.peak_bytes)} at the peak ({size(planned.kept_bytes)} of columns kept), "
        f"bound {size(planned.budget_bytes)}",
        "time": f"about {duration(planned.total_seconds)} (%s)"
        % ", ".join(
            f"{STAGES.get(stage, stage)} {duration(taken) if taken else 'none'}"
            for stage, taken in planned.seconds.items()
        ),
        "layers": ", ".join(_of_treatment(planned.layers)),
    }
    console.print(Text("plan, nothing was analyzed", style="bold"))
    for name, words in facts.items():
        console.print(Text(f"{name:<11}{words}"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "parameters", "treatment", "sweep", "kept", "time"):
        right = name in ("parameters", "sweep", "kept", "time")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "layer", overflow="fold")
    for layer in planned.layers:
        table.add_row(
            Text(layer.name),
            f"{layer.parameters:,}",
            layer.treatment.replace("_", " "),
            str(layer.sweep) if layer.sweep else "–",
            size(layer.kept_bytes) if layer.kept_bytes else "–",
            duration(layer.seconds),
        )
    console.print()
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for layer in planned.layers:
        if layer.reason:
            reasons.setdefault(layer.reason, []).append(layer.name)
    for reason, names in reasons.items():
        console.print()
        console.print(Text(f"{', '.join(names)}: {reason}"), soft_wrap=True)
    for note in planned.notes:
        console.print()
        console.print(Text(note), soft_wrap=True)


def _of_treatment(layers: Sequence[PlannedLayer]) -> list[str]:
    """How many layers have which treatment."""
    counts = Counter(layer.treatment for layer in layers)
    return [f"{counts[name]} {name.replace('_', ' ')}" for name in TREATMENTS if counts[name]]


def size(number: float) -> str:
    """Bytes with a unit."""
    unit = 0
    while number >= 999.5 and unit < len(BINARY) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.3g} {BINARY[unit]}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours in two digits."""
    if seconds < 0.095:
        return "< 0.1 s"
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.2g} min" if seconds < 7200 else f"{seconds / 3600:.2g} h"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
