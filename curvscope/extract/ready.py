"""Everything up to the first sweep: the graph, its layouts, what is taken exactly, and the plan of the passes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from curvscope.extract import cost
from curvscope.extract.choose import (
    DTYPES,
    NONE,
    OVERHEAD_BYTES,
    PROBES,
    budget,
    choose,
    estimate_plan,
    make_plan,
    require_memory,
    standing,
    usable,
    with_budget,
)
from curvscope.extract.clock import now
from curvscope.extract.enough import least_bound, nothing_left_out, told
from curvscope.extract.passes import Passes
from curvscope.extract.pieces import Pieces
from curvscope.extract.plan import NO_COLUMNS, Plan, rows_bytes, size_in_words
from curvscope.extract.positionwise import independent_positions, shared_note
from curvscope.extract.sweep import Progress
from curvscope.graph.functional import Graph
from curvscope.graph.prepare import prepare, varying_axes
from curvscope.graph.ragged import Ragged
from curvscope.graph.verify import Independent, Layouts
from curvscope.load.problem import Problem
from curvscope.planned import PlannedLayer, PlannedRun
from curvscope.settings import Settings

# Forward passes that verifying the layouts takes, about.
FORWARD_PASSES = 4


@dataclass(frozen=True)
class Ready:
    """An analysis that could start its passes.

    Attributes:
        problem: with the loss's class axis settled.
        layouts: those of all data: N and the positions of the longest batch; `outputs` of the first examples.
        fisher, reason, samples: what is taken, why `auto` chose it, and the draws.
        passes, plan: what runs, and what it keeps.
        estimated: passes over probes, and their plan, for layers that are estimated though the others are exact.
        plan_beside: the plan again, with so many bytes kept beside it, under this bound or another.
        notes: sentences for the report.
    """

    problem: Problem
    settings: Settings
    device: torch.device
    layouts: Layouts
    fisher: str
    reason: str
    samples: int
    passes: Passes
    plan: Plan
    notes: list[str]
    estimated: tuple[Passes, Plan] | None = None
    plan_beside: Callable[..., Plan] | None = None

    @property
    def outputs(self) -> list[int]:
        """The shape that the outputs of all examples together have."""
        shape, layout = list(self.layouts.outputs.shape), self.layouts.output
        if isinstance(layout, Ragged):
            return shape
        shape[layout.axis] = layout.outer * self.layouts.examples * layout.inner
        return shape

    def reserving(self, count: int) -> Ready | None:
        """The same with `count` bytes kept beside the plan; None where that would cost a layer anything."""
        assert self.plan_beside is not None
        plan = self.plan_beside(count)
        if _kept(plan) != _kept(self.plan):
            return None
        # the same is left out, for the same reasons
        layers = {
            name: dataclasses.replace(
                plan.layers[name], reason=layer.reason, no_damping=layer.no_damping, no_dump=layer.no_dump
            )
            for name, layer in self.plan.layers.items()
        }
        return dataclasses.replace(self, plan=dataclasses.replace(plan, layers=layers))

    def bound_reserving(self, count: int, share: float) -> int | None:
        """The least --memory tried of which `count` is at most a share, and under which reserving it costs nothing."""
        plan_beside = self.plan_beside
        assert plan_beside is not None

        aside = () if self.estimated is None else self.estimated[1].layers

        def fits(bound: int) -> bool:
            plan = plan_beside(count, bound)
            kept = _kept(plan) == _kept(plan_beside(0, bound))
            return kept and count <= share * bound and nothing_left_out(plan, aside)

        return least_bound(fits, budget(self.settings))


def get_ready(
    problem: Problem,
    settings: Settings,
    device: torch.device,
    report: Progress,
    seconds: dict[str, float],
    reserve: Callable[[Graph, int], int],
) -> Ready:
    """The problem made ready on a device; `seconds` gets the stages export, layout and survey.

    `reserve` gives the bytes that later stages keep beside the columns, of a graph and a number's bytes: the bounds
    that are said to do leave room for them.

    Raises:
        CurvscopeError: whatever speaks against analyzing it.
    """
    asked, settings = settings.memory_bytes is not None, with_budget(settings, device)
    dtype = DTYPES[settings.dtype]
    start = time.perf_counter()
    report("export", problem.name, 0, 1)
    prepared = prepare(problem, settings, device, dtype, varying_axes(problem))
    report("export", problem.name, 1, 1)
    exported = time.perf_counter()
    graph, notes = prepared.graph, list(prepared.notes)
    pieces = Pieces(problem, prepared, device, dtype)
    count = pieces.fit(usable(settings))
    verifying = now(device)
    layouts = pieces.verify(count)
    forward = now(device).since(verifying) / FORWARD_PASSES
    verified = time.perf_counter()
    problem = dataclasses.replace(problem, loss=pieces.look(layouts, forward))
    pieces.settle(layouts)
    seconds |= {"export": exported - start, "layout": verified - exported, "survey": time.perf_counter() - verified}
    survey = pieces.survey
    layouts = dataclasses.replace(layouts, tokens=pieces.tokens(layouts))
    everything = dataclasses.replace(layouts, examples=survey.examples, positions=survey.positions)
    require_memory(settings, standing(graph, everything, settings), pieces.example_bytes, asked=asked)
    looked = time.perf_counter()
    apart = None
    if settings.fisher in ("auto", "exact") and not pieces.in_pieces():
        (piece,) = pieces
        apart = independent_positions(problem.loss, graph, piece.tensors, layouts, piece.targets)
        everything = dataclasses.replace(everything, independent=apart)
        layouts = dataclasses.replace(layouts, independent=apart)
        pieces.apart(apart)
    seconds["positions"] = time.perf_counter() - looked
    exact = Passes(graph, pieces, fisher="exact", samples=0, seed=settings.seed)
    fisher, reason, without = choose(
        problem,
        graph,
        everything,
        problem.targets,
        settings,
        survey.seconds,
        columns=survey.columns,
        timed=exact.pass_seconds,
    )
    samples = settings.samples or PROBES
    passes = Passes(graph, pieces, fisher=fisher, samples=samples, seed=settings.seed, independent=apart)
    passes.rows_bytes = rows_bytes(usable(settings))
    passes.settle(layouts.outputs)
    plan_beside = partial(_plan_beside, graph, everything, passes, settings, without, apart if passes.shared else None)
    reserved = reserve(graph, dtype.itemsize)
    plan = told(plan_beside(0), partial(plan_beside, reserved), budget(settings), without)
    if NO_COLUMNS in reason:
        exact_beside = partial(
            _plan_beside, graph, everything, exact, settings, NONE, apart if exact.shared else None, reserved
        )
        enough = least_bound(lambda bound: nothing_left_out(exact_beside(bound)), budget(settings))
        reason += f" All exact columns fit under --memory {size_in_words(enough)}." if enough else ""
    estimated = None
    if without:
        probes = Passes(graph, pieces, fisher="probe", samples=samples, seed=settings.seed)
        probes.settle(layouts.outputs)
        under = partial(_estimate_under, graph, everything, pieces, samples, settings, without)
        estimated = probes, told(under(budget(settings)), under, budget(settings))
    drawn = estimated[1] if estimated else plan
    lacking = sum(layer.reason.startswith(NO_COLUMNS) for layer in drawn.layers.values())
    if reason and lacking:
        reason += f" For {lacking} of {len(drawn.layers)} layers those of probes do not fit either."
    if passes.shared and apart is not None:
        notes.append(shared_note(apart))
    notes += [reason] if reason else []
    given = passes.pieces.survey.batches
    if settings.batches is not None and given < settings.batches and problem.batches is not None:
        notes.append(f"There are {given} batches, and all were taken: --batches {settings.batches} asked for more.")
    whole = [name for name, layer in plan.layers.items() if layer.no_dump]
    if whole:
        why = plan.layers[whole[0]].no_dump
        notes.append(f"Not in the file, of {', '.join(whole)}: {why}.")
    return Ready(
        problem, settings, device, everything, fisher, reason, samples, passes, plan, notes, estimated, plan_beside
    )


def _plan_beside(
    graph: Graph,
    layouts: Layouts,
    passes: Passes,
    settings: Settings,
    without: Mapping[str, str],
    apart: Independent | None,
    beside: int,
    bound: int | None = None,
) -> Plan:
    """The plan with so many bytes kept beside it; under another bound in the pieces that this one allows."""
    settings, pieces = _under(settings, passes.pieces, bound)
    return make_plan(
        graph,
        layouts,
        passes.fisher,
        passes.columns,
        settings,
        activations=pieces.activations(),
        piece_share=pieces.share(),
        without=without,
        apart=apart,
        beside=beside,
    )


def _estimate_under(
    graph: Graph,
    layouts: Layouts,
    pieces: Pieces,
    samples: int,
    settings: Settings,
    names: Collection[str],
    bound: int,
) -> Plan:
    """The plan of the layers that are estimated though the others are exact, under a bound."""
    settings, pieces = _under(settings, pieces, bound)
    activations, share = pieces.activations(), pieces.share()
    return estimate_plan(graph, layouts, samples, settings, names, activations=activations, piece_share=share)


def _under(settings: Settings, pieces: Pieces, bound: int | None) -> tuple[Settings, Pieces]:
    """Settings and pieces under another bound; as they are without one, or with their own."""
    if bound is None or bound == budget(settings):
        return settings, pieces
    settings = dataclasses.replace(settings, memory_bytes=bound)
    return settings, pieces.under(usable(settings))


def _kept(plan: Plan) -> dict[str, tuple[object, ...]]:
    """What is kept of each layer."""
    return {name: (one.form, one.damped_bytes, one.dump_bytes) for name, one in plan.layers.items()}


def describe_plan(ready: Ready) -> PlannedRun:
    """The plan in numbers: passes, bytes, seconds, and every layer's treatment.

    Seconds come from `curvscope.extract.cost.estimate`: rates measured here, and a few timed passes.
    """
    plan, passes, survey = ready.plan, ready.passes, ready.passes.pieces.survey
    rates = cost.measured_rates(ready.device)
    timed = passes.pass_seconds()
    loads = _loads(ready, passes, plan)
    seconds = cost.estimate(loads, len(plan.groups), timed, rates)
    layers = {load.spec.name: _planned_layer(ready.fisher, load, plan, 1, rates) for load in loads}
    drawn_passes, sweeps = 0, len(plan.groups)
    if ready.estimated is not None:
        # their columns come from sweeps over draws, after those over exact columns
        source, of = ready.estimated
        more = _loads(ready, source, of)
        drawn = cost.estimate(more, len(of.groups), timed, rates)
        seconds = {stage: seconds[stage] + drawn[stage] for stage in seconds}
        layers |= {load.spec.name: _planned_layer(source.fisher, load, of, 1 + sweeps, rates) for load in more}
        drawn_passes = len(of.groups) * source.columns
        sweeps += len(of.groups)
    largest = survey.largest if passes.pieces.size is None else min(passes.pieces.size, survey.largest)
    parts = passes.pieces.count()
    return PlannedRun(
        name=ready.problem.name,
        loss=ready.problem.loss.label,
        fisher=ready.fisher,
        reason=ready.reason,
        device=ready.device.type,
        dtype=ready.settings.dtype,
        examples=survey.examples,
        batches=survey.batches,
        piece_examples=largest,
        columns=passes.columns,
        sweeps=sweeps,
        backward_passes=parts * (len(plan.groups) * passes.columns + drawn_passes + 1),
        budget_bytes=budget(ready.settings),
        peak_bytes=plan.peak_bytes + OVERHEAD_BYTES,
        kept_bytes=max((sum(plan.layers[name].kept_bytes for name in group) for group in plan.groups), default=0),
        seconds=seconds,
        layers=[layers[name] for name in plan.layers],
        notes=[*ready.problem.notes, *ready.notes],
    )


def _loads(ready: Ready, passes: Passes, plan: Plan) -> list[cost.Load]:
    """The sizes of the layers; positions that are kept apart count as examples."""
    apart = ready.layouts.independent if passes.shared else None
    each = apart.positions if apart else 1
    survey = passes.pieces.survey
    return cost.loads_of(
        passes.graph.layers,
        plan,
        {site: count // each for site, count in survey.positions.items()},
        examples=survey.examples * each,
        columns=passes.columns,
        draws=passes.fisher in ("probe", "mc"),
        itemsize=DTYPES[ready.settings.dtype].itemsize,
        exact_factors=ready.fisher not in ("probe", "mc"),
    )


def _planned_layer(fisher: str, load: cost.Load, plan: Plan, first: int, rates: cost.Rates) -> PlannedLayer:
    """One layer's line; sweeps count from `first`."""
    treatment = {"exact": "exact", "empirical": "empirical"}.get(fisher, "estimated")
    layer = load.plan
    sweep = next(number for number, group in enumerate(plan.groups, first) if load.spec.name in group)
    return PlannedLayer(
        load.spec.name,
        load.spec.kind,
        load.spec.parameters,
        "not_assessed" if layer.form is None else treatment,
        layer.form or "",
        0 if layer.form is None else sweep,
        layer.kept_bytes,
        cost.measure_seconds(load, rates),
        layer.reason or layer.no_damping,
    )
