"""What is taken exactly and what is estimated, and what the passes keep: decided before they run."""

from __future__ import annotations

import os
from typing import Any

import torch

from curvscope.extract.plan import LayerPlan, Plan, plan_layer, plan_sweeps, site_positions
from curvscope.extract.roots import Root, exact_columns
from curvscope.graph.functional import Graph
from curvscope.graph.verify import Layouts
from curvscope.load.problem import Problem
from curvscope.settings import Settings

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# A matrix rate that any machine reaches, for the estimate that `auto` decides on.
ASSUMED_RATE = 5e10
PROBES = 8


def choose(
    problem: Problem, graph: Graph, layouts: Layouts, targets: Any, settings: Settings, forward_seconds: float
) -> tuple[str, str]:
    """Exact or probe for `auto`, and in words why; any other choice as it is."""
    if settings.fisher != "auto":
        return settings.fisher, ""
    columns = exact_columns(problem.loss, layouts.outputs, layouts.output, targets)
    plans = layer_plans(graph, layouts, columns, settings, keep_draws=False)
    for name, layer in plans.items():
        if layer.form is None and not graph.layers[name].exact_only:
            return "probe", f"Exact columns were not taken: layer {name}: {layer.reason}. {PROBES} probes instead."
    estimate = 3 * forward_seconds * (columns + 1)
    estimate += sum(layer.measure_flops for layer in plans.values()) / ASSUMED_RATE
    if estimate > settings.time_seconds:
        return "probe", (
            f"Exact columns were not taken: {columns + 1} backward passes and their products would take about "
            f"{estimate:.0f} s, over --time {settings.time_seconds:g}. {PROBES} probes instead."
        )
    fitting = plan_sweeps(plans, budget(settings)).layers
    if any(layer.form is None for name, layer in fitting.items() if not graph.layers[name].exact_only):
        return "probe", f"Exact columns were not taken: they exceed --memory. {PROBES} probes instead."
    return "exact", ""


def layer_plans(
    graph: Graph, layouts: Layouts, columns: int, settings: Settings, *, keep_draws: bool
) -> dict[str, LayerPlan]:
    """The form of every chosen layer's columns."""
    return {
        spec.name: plan_layer(
            spec,
            layouts.examples,
            columns,
            site_positions(layouts.positions, [site.target for site in spec.sites]),
            itemsize=DTYPES[settings.dtype].itemsize,
            keep_draws=keep_draws or "columns" in settings.dump,
            limit=settings.max_columns,
            tokens=layouts.tokens[spec.name].numel() if spec.name in layouts.tokens else None,
        )
        for spec in graph.chosen()
    }


def make_plan(graph: Graph, layouts: Layouts, root: Root, settings: Settings) -> Plan:
    """Forms and groups of all chosen layers under the memory bound."""
    draws = root.fisher in ("probe", "mc")
    return plan_sweeps(layer_plans(graph, layouts, root.columns, settings, keep_draws=draws), budget(settings))


def budget(settings: Settings) -> int:
    """Bytes that the tool may take: --memory, else half of what is free."""
    return settings.memory_bytes or _free_bytes() // 2


def _free_bytes() -> int:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
