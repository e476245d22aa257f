"""What to keep of each layer's columns, and how many sweeps it takes, under a bound on memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from curvscope.extract.collector import Form
from curvscope.graph.sites import LayerSpec

# Slices of columns and their products, on top of what is kept (curvature.block.PIECE_BYTES, a few at once).
WORKING_BYTES = 256 * 2**20
# Columns of a layer without factors (an embedding, say) are kept up to this many numbers.
EXACT_ONLY_ENTRIES = 2**25
# What the relative spectral error takes as a rule.
LANCZOS_STEPS = 30


@dataclass(frozen=True)
class LayerPlan:
    """One layer's columns: the form they are kept in, and what keeping and measuring them takes in bytes and flops."""

    form: Form | None
    kept_bytes: int
    measure_bytes: int
    reason: str = ""
    measure_flops: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Layers in groups, one sweep a group; layers without a form get factors only, for the reason in their plan."""

    layers: dict[str, LayerPlan]
    groups: list[list[str]]


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
    d_in = spec.d_in + (spec.bias is not None)
    if spec.roles:
        return _plan_tied(spec, examples * columns, itemsize, keep_draws, limit)
    if tokens is not None:
        d_in = tokens
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
    solve = 10.0 * small**3 + 20.0 * (d_out**3 + d_in**3)
    if NK >= P and not keep_draws:
        flops = 1.0 * NK * P * P + 4.0 * P * P * (d_out + d_in)
        return LayerPlan("formed", square, 4 * square + examples * P * (itemsize + 8), measure_flops=flops + solve)
    factored = examples * positions * (d_in + columns * d_out)
    dense = NK * P
    if positions == 1:
        flops = 2.0 * NK * NK * d_out + LANCZOS_STEPS * 4.0 * examples * P + 8.0 * NK * (d_out**2 + d_in**2)
        return LayerPlan("outer", factored * itemsize, 4 * square + 16 * factored, measure_flops=flops + solve)
    flops = 2.0 * NK * NK * P + solve
    if factored < dense:
        flops += 4.0 * NK * positions * (d_out**2 + P) + LANCZOS_STEPS * 8.0 * examples * positions * P
        return LayerPlan("factored", factored * itemsize, 4 * square + 16 * factored, measure_flops=flops)
    flops += 4.0 * NK * P * (d_out + d_in) + LANCZOS_STEPS * 8.0 * NK * P
    return LayerPlan("dense", dense * itemsize, 4 * square, measure_flops=flops)


def _plan_grouped(spec: LayerSpec, NK: int, d_in: int, itemsize: int, keep_draws: bool, limit: int) -> LayerPlan:
    """The same for groups, each with a block of its own: formed where that is the smaller side, else dense columns."""
    d_out = spec.d_out // spec.groups
    P = d_out * d_in
    small = NK if keep_draws else min(P, NK)
    if small > limit:
        return LayerPlan(None, 0, 0, _too_large(small, limit))
    flops = spec.groups * (2.0 * NK * P * small + 10.0 * small**3 + 4.0 * P * P * (d_out + d_in))
    if NK >= P and not keep_draws:
        return LayerPlan("formed", 8 * spec.groups * P * P, 8 * spec.groups * P * P, measure_flops=flops)
    dense = spec.groups * NK * P * itemsize
    return LayerPlan("dense", dense, 4 * 8 * small * small + dense, measure_flops=flops)


def _plan_tied(spec: LayerSpec, NK: int, itemsize: int, keep_draws: bool, limit: int) -> LayerPlan:
    """The same for a weight of several roles, whose columns are sums: formed where P is smaller, else dense."""
    P = spec.parameters
    small = NK if keep_draws else min(P, NK)
    if small > limit:
        return LayerPlan(None, 0, 0, _too_large(small, limit))
    products = 2.0 * NK * P * (spec.d_out + spec.d_in)
    flops = 2.0 * NK * P * small + 10.0 * small**3 + products + LANCZOS_STEPS * 8.0 * NK * P
    square = 32 * small * small
    if NK >= P and not keep_draws:
        return LayerPlan("formed", 8 * P * P, square, measure_flops=flops)
    return LayerPlan("dense", NK * P * itemsize, square, measure_flops=flops)


def _plan_exact_only(P: int, NK: int, itemsize: int, keep_draws: bool, limit: int) -> LayerPlan:
    """The same for a parameter without a Kronecker form: G itself where P <= N K, else its columns."""
    small = NK if keep_draws else min(P, NK)
    if small > limit:
        return LayerPlan(None, 0, 0, _too_large(small, limit))
    if NK * P > EXACT_ONLY_ENTRIES and (keep_draws or NK < P):
        return LayerPlan(None, 0, 0, f"its {NK} columns of {P} numbers are too many for a layer without factors")
    flops = 2.0 * NK * P * small + 10.0 * small**3
    if NK >= P and not keep_draws:
        return LayerPlan("formed", 8 * P * P, 32 * P * P, measure_flops=flops)
    return LayerPlan("dense", NK * P * itemsize, 32 * small * small, measure_flops=flops)


def _too_large(small: int, limit: int) -> str:
    return f"min(P, N K) = {small} exceeds {limit}: use fewer examples, --fisher probe or --fisher mc"


def plan_sweeps(layers: Mapping[str, LayerPlan], budget: int) -> Plan:
    """Groups of layers whose kept columns, with the largest layer's measuring, stay under `budget` bytes.

    A layer that exceeds the budget alone gets no columns; its plan says what it would take.
    """
    chosen: dict[str, LayerPlan] = {}
    groups: list[list[str]] = [[]]
    kept, work = 0, 0
    for name, layer in layers.items():
        if layer.form is None:
            chosen[name] = layer
            groups[0].append(name)
            continue
        need = layer.kept_bytes + layer.measure_bytes + WORKING_BYTES
        if need > budget:
            reason = f"its columns take {_size(need)} and --memory allows {_size(budget)}: raise it, or --fisher probe"
            chosen[name] = LayerPlan(None, 0, 0, reason)
            groups[0].append(name)
            continue
        chosen[name] = layer
        if groups[-1] and kept + layer.kept_bytes + max(work, layer.measure_bytes) + WORKING_BYTES > budget:
            groups.append([])
            kept, work = 0, 0
        groups[-1].append(name)
        kept += layer.kept_bytes
        work = max(work, layer.measure_bytes)
    return Plan(chosen, [group for group in groups if group])


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.3g} {unit}"
        count /= 1024
    return ""


def site_positions(positions: Mapping[str, int], names: Sequence[str]) -> int:
    """R of a layer: the positions of all its calls together."""
    return sum(positions[name] for name in names)
