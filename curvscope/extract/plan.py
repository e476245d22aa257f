"""What to keep of each layer's columns, and how many sweeps it takes, under a bound on memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from curvscope.extract.collector import Form
from curvscope.extract.layer_bytes import ROWS_BYTES, Sizes, damped_bytes, dumped_bytes, measure_bytes
from curvscope.graph.sites import LayerSpec

# Slices of columns are worked on in pieces of this many bytes, or of less under a small bound, a few at once.
PIECE_BYTES = 64 * 2**20
LEAST_PIECE_BYTES = 2 * 2**20
PIECES_OF_THE_BOUND = 32
PIECES_AT_ONCE = 4
# Of the bound, what the passes over one piece of the data may take beside the columns that are kept.
ACTIVATIONS_SHARE = 1 / 4
# Columns of a layer without factors (an embedding, say) are kept up to this many numbers.
EXACT_ONLY_ENTRIES = 2**25
# Why something is left out for lack of memory; `enough.told` adds the bound, and the one that would do.
NO_COLUMNS = "the columns do not fit under --memory"
NO_DAMPING = "damped steps do not fit under --memory"
NO_DUMP = "what --dump asks for does not fit under --memory"


@dataclass(frozen=True)
class LayerPlan:
    """One layer's columns: the form they are kept in, and what keeping and measuring them takes in bytes.

    Attributes:
        form: None for no columns, for the `reason`.
        kept_bytes: the columns, from their sweep until they are measured.
        measure_bytes: what measuring them takes beside them, damped steps aside.
        inputs: how many inputs the columns run over, the bias included (0: all of the layer's).
        damped_bytes: the same with damped steps; 0 where there are none.
        no_damping: why damped steps are left out; empty where they are not.
        dump_bytes: what is kept for the file until the run is saved.
        no_dump: why that is left out.
    """

    form: Form | None
    kept_bytes: int
    measure_bytes: int
    reason: str = ""
    inputs: int = 0
    damped_bytes: int = 0
    no_damping: str = ""
    dump_bytes: int = 0
    no_dump: str = ""


@dataclass(frozen=True)
class Plan:
    """Layers in groups, one sweep a group; layers without a form get factors only, for the reason in their plan.

    `peak_bytes` is what the largest group takes with everything beside it, `piece_bytes` how large slices may be.
    """

    layers: dict[str, LayerPlan]
    groups: list[list[str]]
    peak_bytes: int = 0
    piece_bytes: int = PIECE_BYTES


def slice_bytes(budget: int) -> int:
    """How large the slices may be that columns are worked on in, under a bound on everything."""
    return min(PIECE_BYTES, max(LEAST_PIECE_BYTES, budget // PIECES_OF_THE_BOUND))


def working_bytes(budget: int) -> int:
    """What is worked on in slices at a time takes, under a bound on everything: a basis, or steps and columns."""
    return (PIECES_AT_ONCE + 1) * slice_bytes(budget)


def rows_bytes(budget: int) -> int:
    """What rows kept beside columns of another form may take, of all layers together."""
    return min(ROWS_BYTES, 2 * slice_bytes(budget))


def standing_bytes(spec: LayerSpec, itemsize: int, draws: int, tokens: int = 0) -> int:
    """A layer's factors (B of every draw, too), gradient and record, which stay from the first sweep on.

    A of an embedding has a number for every input, and a matrix over the `tokens` that occur.
    """
    if spec.exact_only:
        return spec.parameters * itemsize
    factors = 0
    for role in [spec.role(name) for name in spec.roles] or [spec]:
        d_in, d_out = role.d_in + (role.bias is not None), role.d_out // role.groups
        of_inputs = d_in + tokens**2 if role.kind == "embedding" else 2 * d_in**2
        factors += role.groups * (of_inputs + 2 * (1 + draws) * d_out**2) * itemsize
    return factors + spec.parameters * itemsize + 8 * 6 * min(spec.parameters, 2**14)


def keeps_draws(form: Form | None) -> bool:
    """Whether B of single draws has to be kept as the passes run: not where the columns keep the gradients."""
    return form in ("dense", "formed")


def plan_layer(
    spec: LayerSpec,
    examples: int,
    columns: int,
    positions: int,
    *,
    itemsize: int,
    draws: bool,
    limit: int,
    at_once: int = 0,
    tokens: int | None = None,
    slices: int = 0,
    dump: Collection[str] = (),
) -> LayerPlan:
    """The cheapest form of one layer's columns; those of an embedding run over the `tokens` that occur.

    G itself where P <= N K, of `draws` that of each where it takes fewer bytes than their columns; inputs and gradients
    for R = 1; otherwise the smaller of inputs with gradients and the columns themselves; for groups, several roles and
    parameters without factors the columns themselves, as for all where they are dumped. None where the smaller side is
    over `limit`. Measures work in `slices` bytes beside what is counted, passes on `at_once` examples (0: all).
    """
    d_in = spec.d_in if spec.exact_only else tokens or spec.d_in + (spec.bias is not None)
    d_out = 1 if spec.exact_only else spec.d_out // spec.groups
    positions = 1 if spec.exact_only else positions
    whole = "columns" in dump
    sizes = Sizes(d_out, d_in, examples, columns, positions, itemsize, not spec.exact_only, draws or whole)
    P, NK = sizes.parameters, examples * columns

    def planned(form: Form, kept: int) -> LayerPlan:
        # one column of the examples of a pass, while it is added to G
        column = (at_once or examples) * P * (itemsize + 8) if form == "formed" else 0
        # groups are worked on one after the other, in the same slices
        each, beside = (slices, column) if spec.groups == 1 else (0, column + slices)
        return LayerPlan(
            form,
            spec.groups * kept,
            spec.groups * measure_bytes(form, sizes, each) + beside,
            inputs=tokens or 0,
            damped_bytes=0 if sizes.draws else spec.groups * damped_bytes(form, sizes, each) + beside,
            dump_bytes=spec.groups * dumped_bytes(sizes, dump),
        )

    formed = planned("formed", 8 * P * P * (columns if draws else 1))
    fits = limit >= P and not whole
    if fits and NK >= P and not draws:
        return formed
    factored, dense = examples * positions * (d_in + columns * d_out), NK * P
    kept = planned("dense", dense * itemsize)
    if spec.groups == 1 and not spec.exact_only and not spec.roles and (positions == 1 or factored < dense):
        kept = planned("outer" if positions == 1 else "factored", factored * itemsize)
    if fits and draws and (limit < NK or _bytes(formed) < _bytes(kept)):
        return formed
    if limit < NK:
        return LayerPlan(None, 0, 0, _too_large(NK if whole else min(P, NK), limit, draws, whole))
    if spec.exact_only and NK * P > EXACT_ONLY_ENTRIES:
        return LayerPlan(None, 0, 0, f"its {NK} columns of {P} numbers are too many for a layer without factors")
    return kept


def _bytes(plan: LayerPlan) -> int:
    return plan.kept_bytes + plan.measure_bytes


def _too_large(small: int, limit: int, draws: bool, whole: bool) -> str:
    what = "N K" if whole else "min(P, N K)"
    fewer = "fewer draws with --samples" if draws else "--fisher probe or --fisher mc"
    return f"{what} = {small} exceeds {limit}: use fewer examples, or {fewer}"


def plan_sweeps(
    layers: Mapping[str, LayerPlan],
    budget: int,
    *,
    standing: int = 0,
    activations: int = 0,
    piece_share: float = 0.0,
    rows: int = 0,
) -> Plan:
    """Groups of layers whose kept columns, with the largest layer's measuring, stay under `budget` bytes.

    `standing` bytes are there all the time, `activations` while a pass runs, and of the columns the `piece_share` that
    one piece of the data makes stands beside those of all; `rows` bytes of both are for rows, which only stand beside
    columns. What exceeds the budget for a layer alone is left out in this order, the plan saying so: what is kept for
    the file, damped steps, the columns.
    """
    chosen: dict[str, LayerPlan] = {}
    groups: list[list[str]] = [[]]
    kept, work, peak = 0, 0, standing + activations - rows
    for name, given in layers.items():
        layer = _fitting(given, budget, standing, activations, piece_share)
        chosen[name] = layer
        if layer.form is None:
            groups[0].append(name)
            continue
        own = int(layer.kept_bytes * (1 + piece_share))
        measuring = _measuring(layer, activations)
        if groups[-1] and kept + own + max(work, measuring) + standing > budget:
            groups.append([])
            kept, work = 0, 0
        groups[-1].append(name)
        kept += own
        work = max(work, measuring)
        peak = max(peak, kept + work + standing)
        standing += layer.dump_bytes
    return Plan(chosen, [group for group in groups if group], peak, slice_bytes(budget))


def _measuring(layer: LayerPlan, activations: int) -> int:
    """What a layer takes beside kept columns at its worst: in the passes or while it is measured."""
    # what is dumped is copied once, and once more into the loss's unit
    return max(max(layer.measure_bytes, layer.damped_bytes) + 2 * layer.dump_bytes, activations)


def _fitting(layer: LayerPlan, budget: int, standing: int, activations: int, piece_share: float) -> LayerPlan:
    """The layer with as much as fits, alone, under the budget."""

    def need() -> int:
        return int(layer.kept_bytes * (1 + piece_share)) + _measuring(layer, activations) + standing

    if layer.form is not None and need() > budget and layer.dump_bytes:
        layer = replace(layer, dump_bytes=0, no_dump=NO_DUMP)
    if layer.form is not None and need() > budget and layer.damped_bytes:
        layer = replace(layer, damped_bytes=0, no_damping=NO_DAMPING)
    if layer.form is not None and need() > budget:
        return LayerPlan(None, 0, 0, NO_COLUMNS)
    return layer


def size_in_words(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 999.5 or unit == "GiB":
            return f"{count:.3g} {unit}"
        count /= 1024
    return ""


def site_positions(positions: Mapping[str, int], names: Sequence[str]) -> int:
    """R of a layer: the positions of all its calls together."""
    return sum(positions[name] for name in names)
