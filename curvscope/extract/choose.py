"""What is taken exactly and what is estimated, and what the passes keep: decided before they run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from curvscope.extract.cost import ASSUMED, PassSeconds, loads_of, measured_rates
from curvscope.extract.cost import estimate as estimated_seconds
from curvscope.extract.plan import LayerPlan, Plan, plan_layer, plan_sweeps, site_positions, standing_bytes
from curvscope.extract.roots import exact_columns
from curvscope.graph.functional import Graph
from curvscope.graph.verify import Layouts
from curvscope.load.problem import Problem
from curvscope.settings import Settings

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# A rough estimate below this share of --time needs no measurement.
SETTLED = 0.1
PROBES = 8
OVERHEAD_BYTES = 48 * 2**20


def choose(
    problem: Problem,
    graph: Graph,
    layouts: Layouts,
    targets: Any,
    settings: Settings,
    forward_seconds: float,
    columns: int | None = None,
    timed: Callable[[], PassSeconds] | None = None,
) -> tuple[str, str]:
    """Exact or probe for `auto`, and in words why; any other choice as it is.

    `layouts.examples` are all examples, `columns` is K where it is known: `targets` are those of the first batch.
    `timed` measures a pass; it is asked where a rough estimate does not settle the matter.
    """
    if settings.fisher != "auto":
        return settings.fisher, ""
    if columns is None:
        columns = exact_columns(problem.loss, layouts.outputs, layouts.output, targets)
    plans = layer_plans(graph, layouts, columns, settings, keep_draws=False)
    for name, layer in plans.items():
        if layer.form is None and not graph.layers[name].exact_only:
            return "probe", f"Exact columns were not taken: layer {name}: {layer.reason}. {PROBES} probes instead."
    loads = loads_of(
        graph.layers,
        plans,
        layouts.positions,
        examples=layouts.examples,
        columns=columns,
        draws=False,
        itemsize=DTYPES[settings.dtype].itemsize,
    )
    rough = PassSeconds(6 * forward_seconds, 3 * forward_seconds)
    estimate = sum(estimated_seconds(loads, 1, rough, ASSUMED).values())
    if timed is not None and estimate > SETTLED * settings.time_seconds:
        estimate = sum(estimated_seconds(loads, 1, timed(), measured_rates(layouts.outputs.device)).values())
    if estimate > settings.time_seconds:
        return "probe", (
            f"Exact columns were not taken: {columns + 1} backward passes and their products would take about "
            f"{estimate:.0f} s, over --time {settings.time_seconds:g}. {PROBES} probes instead."
        )
    fitting = plan_sweeps(plans, usable(settings), standing=standing(graph, settings)).layers
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
        )
        for spec in graph.chosen()
    }


def make_plan(
    graph: Graph,
    layouts: Layouts,
    fisher: str,
    columns: int,
    settings: Settings,
    *,
    activations: int = 0,
    piece_share: float = 0.0,
) -> Plan:
    """Forms and groups of all chosen layers under the memory bound; a pass takes `activations` bytes."""
    draws = fisher in ("probe", "mc")
    plans = layer_plans(graph, layouts, columns, settings, keep_draws=draws)
    stays = standing(graph, settings, columns if draws else 0)
    return plan_sweeps(plans, usable(settings), standing=stays, activations=activations, piece_share=piece_share)


def standing(graph: Graph, settings: Settings, draws: int = 0) -> int:
    """Bytes that the factors and records of all layers take; each draw has a B of its own."""
    return sum(standing_bytes(spec, DTYPES[settings.dtype].itemsize, draws) for spec in graph.layers.values())


def budget(settings: Settings) -> int:
    """Bytes that the tool may take: --memory, else half of what is free."""
    return settings.memory_bytes or _free_bytes() // 2


def usable(settings: Settings) -> int:
    """What of the budget is left to plan with: export, solvers and what is freed too late take the rest."""
    whole = budget(settings)
    return whole - min(OVERHEAD_BYTES, whole // 4)


def _free_bytes() -> int:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
