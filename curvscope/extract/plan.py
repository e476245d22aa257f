"""What to keep of each layer's columns, and how many sweeps it takes, under a bound on memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from curvscope.extract.collector import Form
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


@dataclass(frozen=True)
class LayerPlan:
    """One layer's columns: the form they are kept in, and what keeping and measuring them takes in bytes.

    `inputs` is how many inputs the columns run over, the bias included (0: all of the layer's).
    """

    form: Form | None
    kept_bytes: int
    measure_bytes: int
    reason: str = ""
    inputs: int = 0


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
    return 2 * factors + spec.parameters * itemsize + 8 * 6 * min(spec.parameters, 2**14)


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
    keep_draws: bool,
    limit: int,
    tokens: int | None = None,
) -> LayerPlan:
    """The cheapest form of one layer's columns; those of an embedding run over the `tokens` that occur.

    G itself where P <= N K (not where single draws are needed); inputs and gradients for R = 1; otherwise the smaller
    of inputs with gradients and the columns themselves. None where min(P, N K) is over `limit`.
    """
    if spec.roles:
        return _plan_tied(spec, examples * columns, itemsize, keep_draws, limit)
    if tokens is not None:
        sizes = replace(spec, d_in=tokens)
        found = plan_layer(sizes, examples, columns, positions, itemsize=itemsize, keep_draws=keep_draws, limit=limit)
        return replace(found, inputs=tokens)
    d_in = spec.d_in + (spec.bias is not None)
    if spec.exact_only:
        return _plan_exact_only(spec.d_in, examples * columns, itemsize, keep_draws, limit)
    if spec.groups > 1:
        return _plan_grouped(spec, examples * columns, d_in, itemsize, keep_draws, limit)
    P, NK = spec.d_out * d_in, examples * columns
    small = NK if keep_draws else min(P, NK)
    if small > limit:
        return LayerPlan(None, 0, 0, _too_large(small, limit))
    square = 8 * small * small
    d_out = spec.d_out
    if NK >= P and not keep_draws:
        return LayerPlan("formed", square, 4 * square + examples * P * (itemsize + 8))
    factored = examples * positions * (d_in + columns * d_out)
    dense = NK * P
    if positions == 1:
        return LayerPlan("outer", factored * itemsize, 4 * square + 16 * factored)
    if factored < dense:
        return LayerPlan("factored", factored * itemsize, 4 * square + 64 * P)
    return LayerPlan("dense", dense * itemsize, 4 * square + 64 * P)


def _plan_grouped(spec: LayerSpec, NK: int, d_in: int, itemsize: int, keep_draws: bool, limit: int) -> LayerPlan:
    """The same for groups, each with a block of its own: formed where that is the smaller side, else dense columns."""
    d_out = spec.d_out // spec.groups
    P = d_out * d_in
    small = NK if keep_draws else min(P, NK)
    if small > limit:
        return LayerPlan(None, 0, 0, _too_large(small, limit))
    if NK >= P and not keep_draws:
        return LayerPlan("formed", 8 * spec.groups * P * P, 8 * spec.groups * P * P)
    dense = spec.groups * NK * P * itemsize
    return LayerPlan("dense", dense, 4 * 8 * small * small + dense)


def _plan_tied(spec: LayerSpec, NK: int, itemsize: int, keep_draws: bool, limit: int) -> LayerPlan:
    """The same for a weight of several roles, whose columns are sums: formed where P is smaller, else dense."""
    P = spec.parameters
    small = NK if keep_draws else min(P, NK)
    if small > limit:
        return LayerPlan(None, 0, 0, _too_large(small, limit))
    square = 32 * small * small
    if NK >= P and not keep_draws:
        return LayerPlan("formed", 8 * P * P, square)
    return LayerPlan("dense", NK * P * itemsize, square + 64 * P)


def _plan_exact_only(P: int, NK: int, itemsize: int, keep_draws: bool, limit: int) -> LayerPlan:
    """The same for a parameter without a Kronecker form: G itself where P <= N K, else its columns."""
    small = NK if keep_draws else min(P, NK)
    if small > limit:
        return LayerPlan(None, 0, 0, _too_large(small, limit))
    if NK * P > EXACT_ONLY_ENTRIES and (keep_draws or NK < P):
        return LayerPlan(None, 0, 0, f"its {NK} columns of {P} numbers are too many for a layer without factors")
    if NK >= P and not keep_draws:
        return LayerPlan("formed", 8 * P * P, 32 * P * P)
    return LayerPlan("dense", NK * P * itemsize, 32 * small * small)


def _too_large(small: int, limit: int) -> str:
    return f"min(P, N K) = {small} exceeds {limit}: use fewer examples, --fisher probe or --fisher mc"


def plan_sweeps(
    layers: Mapping[str, LayerPlan],
    budget: int,
    *,
    standing: int = 0,
    activations: int = 0,
    piece_share: float = 0.0,
) -> Plan:
    """Groups of layers whose kept columns, with the largest layer's measuring, stay under `budget` bytes.

    `standing` bytes are there all the time, `activations` while a pass runs, and of the columns the `piece_share` that
    one piece of the data makes stands beside those of all. A layer that exceeds the budget alone gets
    no columns; its plan says what it would take.
    """
    piece = slice_bytes(budget)
    slices = PIECES_AT_ONCE * piece
    chosen: dict[str, LayerPlan] = {}
    groups: list[list[str]] = [[]]
    kept, work, peak = 0, 0, standing + activations
    for name, layer in layers.items():
        if layer.form is None:
            chosen[name] = layer
            groups[0].append(name)
            continue
        own = int(layer.kept_bytes * (1 + piece_share))
        measuring = max(layer.measure_bytes + slices, activations)
        need = own + measuring + standing
        if need > budget:
            sizes = f"{size_in_words(need)} and --memory allows {size_in_words(budget)}"
            reason = f"its columns take {sizes}: raise it, or --fisher probe"
            chosen[name] = LayerPlan(None, 0, 0, reason)
            groups[0].append(name)
            continue
        chosen[name] = layer
        if groups[-1] and kept + own + max(work, measuring) + standing > budget:
            groups.append([])
            kept, work = 0, 0
        groups[-1].append(name)
        kept += own
        work = max(work, measuring)
        peak = max(peak, kept + work + standing)
    return Plan(chosen, [group for group in groups if group], peak, piece)


def size_in_words(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}"
        count /= 1024
    return ""


def site_positions(positions: Mapping[str, int], names: Sequence[str]) -> int:
    """R of a layer: the positions of all its calls together."""
    return sum(positions[name] for name in names)
