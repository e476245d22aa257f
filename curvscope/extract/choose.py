"""What is taken exactly and what is estimated, and what the passes keep: decided before they run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from curvscope.errors import UsageError
from curvscope.extract.cost import ASSUMED, PassSeconds, keep_seconds, loads_of, measure_seconds, measured_rates
from curvscope.extract.cost import estimate as estimated_seconds
from curvscope.extract.free import free_bytes
from curvscope.extract.plan import (
    LayerPlan,
    Plan,
    keeps_draws,
    plan_layer,
    plan_sweeps,
    rows_bytes,
    site_positions,
    size_in_words,
    standing_bytes,
    working_bytes,
)
from curvscope.extract.roots import exact_columns
from curvscope.graph.functional import Graph
from curvscope.graph.verify import Independent, Layouts
from curvscope.load.problem import Problem
from curvscope.settings import Settings

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# A rough estimate below this share of --time needs no measurement.
SETTLED = 0.1
PROBES = 8
# Layers that a note names.
NAMED = 5
NONE: Mapping[str, str] = MappingProxyType({})
NO_DRAWS: Mapping[str, int] = MappingProxyType({})
OVERHEAD_BYTES = 48 * 2**20


class Choice(NamedTuple):
    """How curvature is taken: one fisher, in words why where `auto` did not take the exact one for all layers.

    `estimated` are the layers (and why) whose blocks are estimated from probes though `fisher` is exact.
    """

    fisher: str
    reason: str = ""
    estimated: Mapping[str, str] = NONE


def choose(
    problem: Problem,
    graph: Graph,
    layouts: Layouts,
    targets: Any,
    settings: Settings,
    forward_seconds: float,
    columns: int | None = None,
    timed: Callable[[], PassSeconds] | None = None,
) -> Choice:
    """What `auto` takes for which layer; any other choice as it is.

    Everything is a probe where the exact columns' backward passes alone would take too long, or no layer's columns are
    affordable. Otherwise the passes are made, and only those layers are estimated whose min(P, N K) is too large, whose
    columns exceed the memory, or (the dearest first) whose measuring would take longer than what is left of the time.
    `layouts.examples` are all examples, `columns` is K where it is known: `targets` are those of the first batch.
    `timed` measures a pass; it is asked where a rough estimate does not settle the matter.
    """
    if settings.fisher != "auto":
        return Choice(settings.fisher)
    apart = layouts.independent
    if apart is not None:
        columns = apart.columns
    elif columns is None:
        columns = exact_columns(problem.loss, layouts.outputs, layouts.output, targets)
    plans = layer_plans(graph, layouts, columns, settings, draws=False, apart=apart)
    draws = settings.samples or PROBES
    estimated = {name: _what(layer.reason) for name, layer in plans.items() if layer.form is None}
    each = apart.positions if apart else 1
    loads = loads_of(
        graph.layers,
        plans,
        {site: count // each for site, count in layouts.positions.items()},
        examples=layouts.examples * each,
        columns=columns,
        draws=False,
        itemsize=DTYPES[settings.dtype].itemsize,
    )
    passes, rates = PassSeconds(6 * forward_seconds, 3 * forward_seconds), ASSUMED
    if timed is not None and sum(estimated_seconds(loads, 1, passes, rates).values()) > SETTLED * settings.time_seconds:
        passes, rates = timed(), measured_rates(layouts.outputs.device)
    pass_seconds = passes.once + columns * passes.column
    left = settings.time_seconds - pass_seconds
    if left < 0:
        return Choice(
            "probe",
            f"Exact columns were not taken: {columns + 1} backward passes would take about {pass_seconds:.0f} s, over "
            f"--time {settings.time_seconds:g}. {draws} probes instead.",
        )
    costs = {load.spec.name: keep_seconds(load, rates) + measure_seconds(load, rates) for load in loads}
    for name, seconds in sorted(costs.items(), key=lambda item: item[1]):
        if name not in estimated and seconds > left:
            estimated[name] = (
                f"measuring its {columns} columns an example would take about {seconds:.0f} s, more than is left of "
                f"--time {settings.time_seconds:g}"
            )
        elif name not in estimated:
            left -= seconds
    exact = {name: layer for name, layer in plans.items() if name not in estimated}
    fitting = plan_sweeps(exact, usable(settings), standing=standing(graph, layouts, settings))
    estimated |= {name: _what(layer.reason) for name, layer in fitting.layers.items() if layer.form is None}
    left -= pass_seconds * (len(fitting.groups) - 1)
    factored = [name for name in plans if not graph.layers[name].exact_only]
    if left < 0 or (factored and all(name in estimated for name in factored)):
        why = next((f"layer {name}: {estimated[name]}" for name in factored if name in estimated), "")
        if left < 0:
            why = f"their {len(fitting.groups)} sweeps would take longer than --time {settings.time_seconds:g}"
        return Choice("probe", f"Exact columns were not taken: {why}. {draws} probes instead.")
    if not estimated:
        return Choice("exact")
    count = "1 layer gets" if len(estimated) == 1 else f"{len(estimated)} layers get"
    return Choice("exact", f"{count} {draws} probes in place of exact columns: {_named(estimated)}.", estimated)


def _named(reasons: Mapping[str, str]) -> str:
    """The layers, those of one reason together, and the reasons."""
    groups: dict[str, list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault(why, []).append(name)
    said = []
    for why, names in groups.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        said.append(f"{', '.join(names[:NAMED])}{more} ({why})")
    return "; ".join(said[:NAMED]) + ("; ..." if len(said) > NAMED else "")


def _what(reason: str) -> str:
    """A plan's reason without its remedy."""
    return reason.partition(":")[0]


def layer_plans(
    graph: Graph,
    layouts: Layouts,
    columns: int,
    settings: Settings,
    *,
    draws: bool,
    apart: Independent | None = None,
    piece_share: float = 0.0,
) -> dict[str, LayerPlan]:
    """The form of every chosen layer's columns; positions that are kept `apart` count as examples.

    The largest piece of the data holds `piece_share` of the examples; 0: there is one piece.
    """
    each = apart.positions if apart else 1
    return {
        spec.name: plan_layer(
            spec,
            layouts.examples * each,
            columns,
            site_positions(layouts.positions, [site.target for site in spec.sites]) // each,
            itemsize=DTYPES[settings.dtype].itemsize,
            draws=draws,
            limit=settings.max_columns,
            at_once=math.ceil(layouts.examples * each * piece_share),
            tokens=layouts.tokens[spec.name].numel() if spec.name in layouts.tokens else None,
            slices=working_bytes(usable(settings)),
            dump=settings.dump,
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
    without: Mapping[str, str] = NONE,
    apart: Independent | None = None,
    beside: int = 0,
) -> Plan:
    """Forms and groups of all chosen layers under the memory bound; a pass takes `activations` bytes.

    Those `without` columns get none, for a reason; positions that are kept `apart` count as examples. `beside` bytes
    are kept of the layers for later stages.
    """
    draws = fisher in ("probe", "mc")
    plans = layer_plans(graph, layouts, columns, settings, draws=draws, apart=apart, piece_share=piece_share)
    plans |= {name: LayerPlan(None, 0, 0, reason) for name, reason in without.items()}
    per_draw = {name: columns for name, layer in plans.items() if draws and keeps_draws(layer.form)}
    # rows may be kept beside columns of another form
    rows = rows_bytes(usable(settings))
    stays = standing(graph, layouts, settings, per_draw) + rows
    # while pieces are put together, each has factors beside those of all before
    passing = activations + (stays if piece_share > 0 else 0)
    return plan_sweeps(
        plans,
        usable(settings),
        standing=stays + beside,
        activations=passing,
        piece_share=piece_share,
        rows=rows if passing == activations else 2 * rows,
    )


def estimate_plan(
    graph: Graph,
    layouts: Layouts,
    columns: int,
    settings: Settings,
    names: Collection[str],
    *,
    activations: int = 0,
    piece_share: float = 0.0,
) -> Plan:
    """The same for a sweep over draws that serves some layers only."""
    plans = layer_plans(graph, layouts, columns, settings, draws=True, piece_share=piece_share)
    chosen = {name: plans[name] for name in plans if name in names}
    stays = standing(graph, layouts, settings)
    return plan_sweeps(chosen, usable(settings), standing=stays, activations=activations, piece_share=piece_share)


def standing(graph: Graph, layouts: Layouts, settings: Settings, draws: Mapping[str, int] = NO_DRAWS) -> int:
    """Bytes that the factors and records of all layers take; those with `draws` keep a B of each."""
    itemsize = DTYPES[settings.dtype].itemsize
    tokens = {name: seen.numel() for name, seen in layouts.tokens.items()}
    return sum(
        standing_bytes(spec, itemsize, draws.get(spec.name, 0), tokens.get(spec.name, 0))
        for spec in graph.layers.values()
    )


def budget(settings: Settings) -> int:
    """Bytes that the tool may take: --memory, else half of what is free on the CPU now."""
    return settings.memory_bytes or free_bytes(torch.device("cpu")) // 2


def with_budget(settings: Settings, device: torch.device) -> Settings:
    """The settings with a bound on memory: where none is given, half of what is free on the device at this moment."""
    if settings.memory_bytes is not None:
        return settings
    return dataclasses.replace(settings, memory_bytes=max(1, free_bytes(device) // 2))


def usable(settings: Settings) -> int:
    """What of the budget is left to plan with: export, solvers and what is freed too late take the rest."""
    whole = budget(settings)
    return max(whole - OVERHEAD_BYTES, whole // 16)


def require_memory(settings: Settings, standing: int, example: int, *, asked: bool) -> None:
    """Refuse a bound that not even factors fit under: what stands throughout, and a pass over one example.

    Raises:
        UsageError: --memory is `asked` for and too small, with the least that it would have to be.
        MemoryError: half of what is free is too little.
    """
    # while pieces are put together, each has factors beside those of all before
    least = OVERHEAD_BYTES + 2 * standing + example + rows_bytes(0)
    bound = budget(settings)
    if bound < least and not asked:
        raise MemoryError
    if bound < least:
        raise UsageError(
            f"The bound on memory leaves no room for an analysis: {size_in_words(bound)} is less than the "
            f"{size_in_words(least)} that the factors of all layers take with one example at a time.",
            where="--memory",
            remedy=f"Give at least {size_in_words(least)} (more is needed for columns), or fewer layers with --layers.",
        )
