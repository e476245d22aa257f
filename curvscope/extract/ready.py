"""Everything up to the first sweep: the graph, its layouts, what is taken exactly, and the plan of the passes."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import torch

from curvscope.extract import cost
from curvscope.extract.choose import (
    DTYPES,
    OVERHEAD_BYTES,
    PROBES,
    budget,
    choose,
    estimate_plan,
    make_plan,
    usable,
    with_budget,
)
from curvscope.extract.clock import now
from curvscope.extract.passes import Passes
from curvscope.extract.pieces import Pieces
from curvscope.extract.plan import Plan, rows_bytes
from curvscope.extract.positionwise import independent_positions, shared_note
from curvscope.extract.sweep import Progress
from curvscope.graph.prepare import prepare, varying_axes
from curvscope.graph.ragged import Ragged
from curvscope.graph.verify import Layouts
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

    @property
    def outputs(self) -> list[int]:
        """The shape that the outputs of all examples together have."""
        shape, layout = list(self.layouts.outputs.shape), self.layouts.output
        if isinstance(layout, Ragged):
            return shape
        shape[layout.axis] = layout.outer * self.layouts.examples * layout.inner
        return shape


def get_ready(
    problem: Problem, settings: Settings, device: torch.device, report: Progress, seconds: dict[str, float]
) -> Ready:
    """The problem made ready on a device; `seconds` gets the stages export, layout and survey.

    Raises:
        CurvscopeError: whatever speaks against analyzing it.
    """
    settings = with_budget(settings, device)
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
    plan = make_plan(
        graph,
        everything,
        fisher,
        passes.columns,
        settings,
        activations=pieces.activations(),
        piece_share=pieces.share(),
        without=without,
        apart=apart if passes.shared else None,
    )
    estimated = None
    if without:
        probes = Passes(graph, pieces, fisher="probe", samples=samples, seed=settings.seed)
        probes.settle(layouts.outputs)
        activations = pieces.activations()
        estimated = probes, estimate_plan(graph, everything, samples, settings, without, activations=activations)
    if passes.shared and apart is not None:
        notes.append(shared_note(apart))
    notes += [reason] if reason else []
    whole = [name for name, layer in plan.layers.items() if layer.no_dump]
    if whole:
        notes.append(f"--memory leaves no room for what --dump asks of {', '.join(whole)}: it is not in the file.")
    return Ready(problem, settings, device, everything, fisher, reason, samples, passes, plan, notes, estimated)


def describe_plan(ready: Ready) -> PlannedRun:
    """The plan in numbers: passes, bytes, seconds, and every layer's treatment.

    Seconds come from `curvscope.extract.cost.estimate`: rates measured here, and one timed forward pass with two
    backward passes.
    """
    graph, plan, passes, survey = ready.passes.graph, ready.plan, ready.passes, ready.passes.pieces.survey
    rates = cost.measured_rates(ready.device)
    draws = ready.fisher in ("probe", "mc")
    loads = cost.loads_of(
        graph.layers,
        plan,
        survey.positions,
        examples=survey.examples,
        columns=passes.columns,
        draws=draws,
        itemsize=DTYPES[ready.settings.dtype].itemsize,
    )
    timed = passes.pass_seconds()
    seconds = cost.estimate(loads, len(plan.groups), timed, rates)
    sweep_of = {name: number for number, group in enumerate(plan.groups, 1) for name in group}
    treatment = {"exact": "exact", "empirical": "empirical"}.get(ready.fisher, "estimated")
    layers = [
        PlannedLayer(
            load.spec.name,
            load.spec.kind,
            load.spec.parameters,
            "not_assessed" if load.plan.form is None else treatment,
            load.plan.form or "",
            0 if load.plan.form is None else sweep_of[load.spec.name],
            load.plan.kept_bytes,
            cost.measure_seconds(load, rates),
            load.plan.reason,
        )
        for load in loads
    ]
    largest = survey.largest if passes.pieces.size is None else min(passes.pieces.size, survey.largest)
    parts = passes.pieces.count()
    sweeps = len(plan.groups)
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
        backward_passes=parts * (sweeps * passes.columns + 1),
        budget_bytes=budget(ready.settings),
        peak_bytes=plan.peak_bytes + OVERHEAD_BYTES,
        kept_bytes=max((sum(plan.layers[name].kept_bytes for name in group) for group in plan.groups), default=0),
        seconds=seconds,
        layers=layers,
        notes=[*ready.problem.notes, *ready.notes],
    )
