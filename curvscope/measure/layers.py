"""Every layer's record: sweeps over groups of layers, each followed by the measures of that group.

Where memory runs out, passes shrink to fewer examples (`Passes.sweep`) and measures to smaller slices; what does not
work even so is not assessed, and everything else stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from torch import Tensor

from curvscope.curvature.kronecker import Kronecker
from curvscope.errors import out_of_memory
from curvscope.extract.collector import Columns, Extract, Form
from curvscope.extract.footprint import release
from curvscope.extract.passes import Passes
from curvscope.extract.plan import PIECES_AT_ONCE, LayerPlan, Plan, keeps_draws
from curvscope.extract.sweep import Progress
from curvscope.measure.layer import measure_layer, unmeasured
from curvscope.measure.wishes import Wishes
from curvscope.records import Layer

LEAST_SLICE_BYTES = 2**20
NO_PASS = "memory ran out in the passes that keep its columns, even with one example at a time: --memory, or --layers"
NO_MEASURE = "memory ran out while it was measured, even in small slices: --memory, or fewer examples"
T = TypeVar("T")


def measure_layers(
    passes: Passes,
    plan: Plan,
    wishes: Wishes,
    report: Progress,
    seconds: dict[str, float],
    estimated: tuple[Passes, Plan] | None = None,
) -> tuple[dict[str, Layer], float]:
    """Every chosen layer's record, in forward order, and the squared 2-norm of dL over all trained parameters.

    The layers of the plan that is `estimated` get their columns from its passes over draws: blocks estimated, factors
    exact.

    Raises:
        MemoryError: not even the factors' sweep fits, one example at a time.
    """
    graph = passes.graph
    drawn = wishes.fisher in ("probe", "mc")
    names = [spec.name for spec in graph.chosen()]
    first: dict[str, Extract] = {}
    measured: dict[str, Layer] = {}
    squared = 0.0
    projected: Mapping[str, Mapping[str, Tensor]] = {}
    sweeps = [(number, group, passes, plan) for number, group in enumerate(plan.groups)]
    aside: Collection[str] = ()
    if estimated is not None:
        sweeps += [(number, group, *estimated) for number, group in enumerate(estimated[1].groups, start=1)]
        aside = estimated[1].layers
    for number, group, source, of in sweeps:
        reasons = {name: of.layers[name].reason for name in group}
        forms: dict[str, Form | None] = {name: of.layers[name].form for name in group}
        with timed(seconds, "passes"):
            if number == 0:
                later: dict[str, Form | None] = {name: None for name in names if name not in forms}
                extracts = _first_sweep(passes, plan, forms | later, drawn, names, report)
                if extracts is None:
                    reasons = {name: reasons[name] or NO_PASS for name in group}
                    forms = dict.fromkeys(forms)
                    extracts = _first_sweep(passes, plan, forms | later, drawn, names, report)
                if extracts is None:
                    raise MemoryError
                gradients = [extract.gradient for extract in extracts.values()] + list(passes.rest.values())
                squared = sum(float(g.double().square().sum()) for g in gradients if g is not None)
                first = {name: extracts[name] for name in later}
                unassigned = [name for name in extracts if name not in aside]
                projected = _projected(passes, plan, extracts, unassigned, wishes, report)
            else:
                source.unit = passes.unit if source is not passes else source.unit
                more = attempt(partial(source.sweep, forms, first=False, progress=report))
                if more is None:
                    reasons = {name: reasons[name] or NO_PASS for name in group}
                columns = {name: None if more is None else more.pop(name).columns for name in group}
                extracts = {name: dataclasses.replace(first.pop(name), columns=columns.pop(name)) for name in group}
        release()
        for name in group:
            if source is passes and name in aside:
                first[name] = extracts.pop(name)
                continue
            report("measure", name, len(measured), len(names))
            with timed(seconds, "measure"):
                # popped: its columns are gone before the next layer's are worked on
                wish = _of_layer(wishes, of.layers[name], source.fisher, drawn=drawn and source is passes)
                measured[name] = _measured([extracts.pop(name)], wish, reasons[name], projected.get(name))
                release()
    report("measure", "", len(names), len(names))
    return {name: measured[name] for name in names}, squared


def _of_layer(wishes: Wishes, plan: LayerPlan, fisher: str, *, drawn: bool) -> Wishes:
    """What to measure of one layer: what the plan left out for lack of memory is not wanted."""
    return dataclasses.replace(
        wishes,
        fisher=fisher,
        drawn_factors=drawn,
        no_damping=plan.no_damping,
        dump=() if plan.no_dump else wishes.dump,
    )


def _first_sweep(
    passes: Passes,
    plan: Plan,
    forms: Mapping[str, Form | None],
    drawn: bool,
    names: Sequence[str],
    report: Progress,
) -> dict[str, Extract] | None:
    return attempt(
        lambda: passes.sweep(
            forms,
            first=True,
            per_draw=[name for name in names if keeps_draws(plan.layers[name].form)] if drawn else (),
            gradient_only=[name for name in passes.graph.layers if name not in names],
            progress=report,
        )
    )


def _projected(
    passes: Passes,
    plan: Plan,
    extracts: Mapping[str, Extract],
    names: Sequence[str],
    wishes: Wishes,
    report: Progress,
) -> Mapping[str, Mapping[str, Tensor]]:
    """A second sweep for the layers whose exact columns can't be kept: EKFAC's diagonals in the final bases."""
    if wishes.fisher not in ("exact", "empirical"):
        return {}
    bases = {}
    for name in names:
        extract = extracts[name]
        spec = extract.spec
        wanted = plan.layers[name].form is None if name in plan.layers else False
        fits = 64 * spec.parameters <= PIECES_AT_ONCE * wishes.piece_bytes
        plain = spec.groups == 1 and extract.tokens is None
        if wanted and fits and extract.factors and plain:
            flavours = ("expand",) if extract.positions == 1 else ("expand", "reduce")
            found = {flavour: Kronecker(*extract.factors[flavour]).bases for flavour in flavours}
            bases[name] = {flavour: (U_A, U_B) for flavour, (_, U_A, _, U_B) in found.items()}
    if not bases:
        return {}
    return attempt(partial(passes.project, bases, wishes.piece_bytes, report)) or {}


def _measured(held: list[Extract], wishes: Wishes, reason: str, projected: Mapping[str, Tensor] | None) -> Layer:
    """The record of the one extract that is held: in smaller slices, then on the CPU, then without its columns."""
    while True:
        found = attempt(partial(measure_layer, held[0], wishes, why_no_columns=reason, projected=projected))
        if found is not None:
            return found
        release()
        smaller = dataclasses.replace(wishes, piece_bytes=wishes.piece_bytes // 4)
        if smaller.piece_bytes >= LEAST_SLICE_BYTES:
            wishes = smaller
        elif held[0].gradient is not None and held[0].gradient.device.type != "cpu":
            held[0] = _on_cpu(held[0])
        elif held[0].columns is not None:
            held[0], reason = dataclasses.replace(held[0], columns=None), NO_MEASURE
        else:
            return unmeasured(held[0], wishes.fisher, NO_MEASURE)


def attempt(call: Callable[[], T]) -> T | None:
    """What the call returns; None where memory ran out."""
    try:
        return call()
    except Exception as error:
        if not out_of_memory(error):
            raise
    release()
    return None


def _on_cpu(extract: Extract) -> Extract:
    """The same extract with all its tensors on the CPU."""

    def moved(columns: Columns) -> Columns:
        return dataclasses.replace(
            columns,
            inputs=_cpu(columns.inputs),
            gradients=_cpu(columns.gradients),
            values=_cpu(columns.values),
            block=_cpu(columns.block),
            row_inputs=_cpu(columns.row_inputs),
            row_gradients=_cpu(columns.row_gradients),
        )

    columns = extract.columns
    kept = [moved(each) for each in columns] if isinstance(columns, list) else columns and moved(columns)
    return dataclasses.replace(
        extract,
        factors={name: (A.cpu(), B.cpu()) for name, (A, B) in extract.factors.items()},
        gradient=_cpu(extract.gradient),
        tokens=_cpu(extract.tokens),
        example_squares=_cpu(extract.example_squares),
        mean_input=_cpu(extract.mean_input),
        real=_cpu(extract.real),
        roles={name: _on_cpu(role) for name, role in extract.roles.items()},
        columns=kept,
        probe_B={name: B.cpu() for name, B in extract.probe_B.items()},
    )


def _cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the wall-clock seconds of the block to a stage."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
