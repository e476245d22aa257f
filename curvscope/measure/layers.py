"""Every layer's record: sweeps over groups of layers, each followed by the measures of that group."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

from curvscope.extract.collector import Extract, Form
from curvscope.extract.footprint import release
from curvscope.extract.passes import Passes
from curvscope.extract.plan import Plan
from curvscope.extract.sweep import Progress
from curvscope.measure.layer import Wishes, measure_layer
from curvscope.records import Layer


def measure_layers(
    passes: Passes, plan: Plan, wishes: Wishes, report: Progress, seconds: dict[str, float]
) -> tuple[dict[str, Layer], float]:
    """Every chosen layer's record, in forward order, and the squared 2-norm of dL over all trained parameters."""
    graph = passes.graph
    names = [spec.name for spec in graph.chosen()]
    first: dict[str, Extract] = {}
    measured: dict[str, Layer] = {}
    squared = 0.0
    for number, group in enumerate(plan.groups):
        forms: dict[str, Form | None] = {name: plan.layers[name].form for name in group}
        with timed(seconds, "passes"):
            if number == 0:
                later: dict[str, Form | None] = {name: None for name in names if name not in forms}
                extracts = passes.sweep(
                    forms | later,
                    first=True,
                    per_draw=wishes.fisher in ("probe", "mc"),
                    gradient_only=[name for name in graph.layers if name not in names],
                    progress=report,
                )
                gradients = [extract.gradient for extract in extracts.values()] + list(passes.rest.values())
                squared = sum(float(g.double().square().sum()) for g in gradients if g is not None)
                first = {name: extracts[name] for name in later}
            else:
                more = passes.sweep(forms, first=False, progress=report)
                extracts = {
                    name: dataclasses.replace(first.pop(name), columns=extract.columns)
                    for name, extract in more.items()
                }
                del more
        release()
        for name in group:
            report("measure", name, len(measured), len(names))
            with timed(seconds, "measure"):
                # popped: its columns are gone before the next layer's are worked on
                measured[name] = measure_layer(extracts.pop(name), wishes, why_no_columns=plan.layers[name].reason)
                release()
    report("measure", "", len(names), len(names))
    return {name: measured[name] for name in names}, squared


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the wall-clock seconds of the block to a stage."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
