"""What an analysis will take in seconds: rates of this machine, one timed pass, and the operations of every measure.

`--fisher auto` and `--dry-run` both estimate with `estimate`. Rates are measured in the process that will do the work,
on matrices of the size that the measures see, in a fraction of a second; what counts is the time that the process
worked, so that a busy machine gets the same plan (`curvscope.extract.clock`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from curvscope.extract.clock import seconds_of
from curvscope.extract.collector import Form
from curvscope.extract.layer_bytes import ROWS_BYTES
from curvscope.extract.plan import LayerPlan, Plan
from curvscope.graph.sites import LayerSpec

# Lanczos steps that the largest eigenvalue of G - M and the nearest Kronecker product take as a rule.
SPECTRAL_STEPS = 22
NEAREST_STEPS = 6
# A symmetric product is made by blocks of rows, see `curvscope.extract.symmetric`.
SYMMETRIC = 5 / 8
SIZE = 384
# Products that the damping grid, and the conditions at its marked values, take as a rule; what those may take, and the
# largest block that has either.
GRID_STEPS = 60
CONDITION_STEPS = 640
CONDITION_FREE = 2e10
DAMPED_SIZE = 4096
# kron_best may always take this many operations; beyond it only as many as the other measures of the layer.
NEAREST_FREE = 2e10
# What the split of K-FAC's error may take at most by default, a flavour (`measure.sources`).
SPLIT_FREE = 2e10
# Steps to the top direction of a layer's Gram matrix, for the shares of the examples.
SHARES_STEPS = 40
# From this size on shifted solves go through the tridiagonal form (below, eigenvectors take less than half a second);
# so many vectors are then turned into it and back.
TRIDIAGONAL_FROM = 1024
TURNED_VECTORS = 200
# EKFAC from draws takes so many of them at least (`measure.ekfac_estimate`). For each half of them there are bases of
# the other half's, of its own halves, and of it without each draw, or without each of so many groups of draws.
FOLD_DRAWS = 8
FOLD_BASES = 3
MOST_GROUPS = 8
# Seconds of what does not grow with the sizes (thousands of small operations), a layer and a flavour.
LAYER_SECONDS = 0.02
FLAVOUR_SECONDS = 0.02


@dataclass(frozen=True)
class Rates:
    """Operations a second: products in float32 and float64, n^3 of an eigendecomposition, sorted numbers, bytes moved.

    `skinny` is the float32 rate of products with one short side, as single positions and examples make them.
    """

    product32: float
    product64: float
    skinny: float
    eigenvectors: float
    eigenvalues: float
    sorted: float
    bytes: float


@dataclass(frozen=True)
class PassSeconds:
    """One sweep over all data: what it takes once (forward, gradient, A), and for every column."""

    once: float
    column: float


# Rates that any machine reaches, where none were measured.
ASSUMED = Rates(5e10, 2.5e10, 1e10, 1e9, 4e9, 1e7, 5e9)


def measured_rates(device: torch.device) -> Rates:
    """The rates of this machine with the threads that torch has now; takes about half a second."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).to(device)

    wide, narrow = random(SIZE, SIZE), random(SIZE, SIZE, dtype=torch.float32)
    gradients, inputs = random(64, 64, 96, dtype=torch.float32), random(64, 64, 96, dtype=torch.float32)
    symmetric = wide @ wide.T
    cube, numbers = float(SIZE**3), random(2**16)
    large = random(2**21)
    return Rates(
        product32=2 * cube / seconds_of(lambda: narrow @ narrow, device),
        product64=2 * cube / seconds_of(lambda: wide @ wide, device),
        skinny=2 * 64 * 64 * 96 * 96 / seconds_of(lambda: torch.matmul(gradients.transpose(1, 2), inputs), device),
        eigenvectors=cube / seconds_of(lambda: torch.linalg.eigh(symmetric), device),
        eigenvalues=cube / seconds_of(lambda: torch.linalg.eigvalsh(symmetric), device),
        sorted=2**16 / seconds_of(lambda: numbers.sort(), device),
        bytes=3 * 8 * 2**21 / seconds_of(lambda: large * 2.0, device),
    )


@dataclass(frozen=True)
class Load:
    """One layer's sizes: P = d_out d_in of one group, N examples of R positions with K columns.

    The columns of a layer may be `draws` where its factors are exact.
    """

    spec: LayerSpec
    plan: LayerPlan
    examples: int
    columns: int
    positions: int
    draws: bool
    itemsize: int
    exact_factors: bool = False


def estimate(loads: Sequence[Load], groups: int, passes: PassSeconds, rates: Rates) -> dict[str, float]:
    """Seconds of all passes and of all measures, `{"passes": ..., "measure": ...}`."""
    columns = loads[0].columns if loads else 0
    kept = sum(keep_seconds(load, rates) for load in loads)
    return {
        "passes": groups * (passes.once + columns * passes.column) + kept,
        "measure": sum(measure_seconds(load, rates) for load in loads),
    }


def keep_seconds(load: Load, rates: Rates) -> float:
    """What keeping the columns adds to the passes."""
    N, K, R, groups = load.examples, load.columns, load.positions, load.spec.groups
    d_out, _, P = _sizes(load)
    if load.plan.form is None:
        return 0.0
    if load.plan.form in ("outer", "factored"):
        return 2.0 * load.itemsize * N * K * R * d_out / rates.bytes
    made = 0.0 if load.spec.exact_only else 2.0 * groups * N * K * R * P / rates.skinny
    if load.plan.form == "dense":
        return made + 2.0 * groups * load.itemsize * N * K * P / rates.bytes
    # every pass reads and writes all of G, however few its examples
    moved = 16.0 * SYMMETRIC * K * P * P + 24.0 * N * K * P
    return made + groups * (2.0 * SYMMETRIC * N * K * P * P / rates.product64 + moved / rates.bytes)


def measure_seconds(load: Load, rates: Rates) -> float:
    """Everything that is measured of one layer once its columns are there."""
    spec, form = load.spec, load.plan.form
    d_out, d_in, P = _sizes(load)
    NK = load.examples * load.columns
    flavours = 1 if load.positions == 1 else 2
    factors = 0.0
    if not spec.exact_only:
        cubes = spec.groups * float(d_out**3 + d_in**3)
        # extremes of the stored factors, the condition of expand's, then the eigenbasis that K-FAC and EKFAC share
        factors = 3 * cubes / rates.eigenvalues + flavours * cubes / rates.eigenvectors
        factors += flavours * spec.groups * P / rates.sorted + LAYER_SECONDS + flavours * FLAVOUR_SECONDS
    if form is None:
        return factors
    if load.draws:
        return factors + spec.groups * drawn_seconds(load, flavours, rates)
    small = P if form == "formed" else NK
    block = small**3 / rates.eigenvalues + _gram(load, rates) + P / rates.sorted
    if spec.exact_only:
        return block + _damped(load, small, rates)
    # G and K-FAC times a vector, and that vector against all before, twice
    step = 1.3 * _product(load, rates) + 2.0 * P * (d_out + d_in) / rates.product64
    step += 2 * SPECTRAL_STEPS * 8.0 * P / rates.bytes
    every = flavours * (_rotation(load, rates) + P / rates.sorted + SPECTRAL_STEPS * step)
    each = block + every + _nearest(load, rates) + _damped(load, small, rates)
    return factors + spec.groups * each + (0.0 if spec.groups > 1 else _causes(load, small, rates))


def drawn_seconds(load: Load, flavours: int, rates: Rates) -> float:
    """What is measured of one group whose columns are draws, beside its factors' own spectra."""
    d_out, d_in, P = _sizes(load)
    K, small = load.columns, P if load.plan.form == "formed" else load.examples * load.columns
    whole = _gram(load, rates) + _diagonals(load, rates)
    # products of draws with draws, for every approximation and the trace
    pairs = K * K * 2.0 * P * P / rates.product64 if load.plan.form == "formed" else 24.0 * small**2 / rates.bytes
    if load.spec.exact_only:
        return whole + 2 * pairs
    bases = 1.0 if load.exact_factors else 0.0
    spectra = 0.0
    if not load.exact_factors:
        # B of all draws and without each, with A once more
        spectra = ((K + 1) * d_out**3 + d_in**3) / rates.eigenvalues
        if K >= FOLD_DRAWS:
            half = K - K // 2
            bases = 2.0 * (FOLD_BASES + -(-half // -(-half // MOST_GROUPS)))
    share = 1.0 if load.exact_factors else 0.5
    ekfac = (bases * d_out**3 + d_in**3) / rates.eigenvectors + share * bases * _diagonals(load, rates, turned=True)
    turn = _turned_inputs(load, rates) if bases else 0.0
    each = _contraction(load, rates) + spectra + (ekfac + turn if bases else 0.0)
    return whole + (2 * flavours + 2) * pairs + flavours * each


def _turned_inputs(load: Load, rates: Rates) -> float:
    """All draws with their inputs in a basis of A."""
    _, d_in, P = _sizes(load)
    N, NK = load.examples, load.examples * load.columns
    if load.plan.form == "formed":
        return load.columns * (2.0 * P * P * d_in / rates.product64 + 24.0 * P * P / rates.bytes)
    if load.plan.form == "dense":
        return 4.0 * NK * P * d_in / rates.skinny + 24.0 * NK * P / rates.bytes
    return 2.0 * N * load.positions * d_in**2 / rates.product64


def _diagonals(load: Load, rates: Rates, *, turned: bool = False) -> float:
    """diag(G) of each of all draws; with outputs that are `turned` into another basis."""
    d_out, _, P = _sizes(load)
    NK, R = load.examples * load.columns, load.positions
    if load.plan.form == "formed":
        # the diagonal over the inputs, once for all
        return load.columns * turned * (2.0 * P * d_out**2 / rates.product64 + 24.0 * P * d_out / rates.bytes)
    # double precision: twice what single takes
    if load.plan.form == "dense":
        return turned * 4.0 * NK * P * d_out / rates.skinny + 24.0 * NK * P / rates.bytes
    turn = turned * 2.0 * NK * R * d_out**2 / rates.product64 + 24.0 * NK * R * d_out / rates.bytes
    if load.plan.form == "outer":
        return turn + 2.0 * NK * P / rates.product64
    return turn + 4.0 * NK * R * P / rates.skinny + 16.0 * NK * P / rates.bytes


def _sizes(load: Load) -> tuple[int, int, int]:
    """d_out and d_in (with the bias) of one group, and P."""
    d_out = load.spec.d_out // load.spec.groups
    d_in = load.plan.inputs or load.spec.d_in + (load.spec.bias is not None)
    return d_out, d_in, d_out * d_in


def _gram(load: Load, rates: Rates) -> float:
    """V^T V, or nothing where G itself is kept."""
    d_out, d_in, P = _sizes(load)
    NK = load.examples * load.columns
    if load.plan.form == "formed":
        return 0.0
    if load.plan.form == "outer":
        return 2.0 * (NK**2 * d_out + load.examples**2 * d_in) / rates.product64 + 32.0 * NK**2 / rates.bytes
    outer = 2.0 * NK * load.positions * P / rates.skinny if load.plan.form == "factored" else 0.0
    return outer + 2.0 * SYMMETRIC * NK**2 * P / rates.product64 + 32.0 * NK * P / rates.bytes


def _rotation(load: Load, rates: Rates) -> float:
    """EKFAC's diagonal."""
    d_out, d_in, P = _sizes(load)
    N, NK, R = load.examples, load.examples * load.columns, load.positions
    if load.plan.form == "formed":
        return 2.0 * P * P * (d_in + d_out) / rates.product64 + 2.0 * P * (d_in + d_out) * d_in / rates.product64
    if load.plan.form == "dense":
        return 2.0 * NK * P * (d_in + d_out) / rates.skinny + 2.0 * load.itemsize * NK * P / rates.bytes
    turned = 2.0 * (NK * R * d_out**2 + N * R * d_in**2 + N * P) / rates.product32
    if load.plan.form == "outer":
        return turned
    return turned + 2.0 * NK * R * P / rates.skinny + 4.0 * load.itemsize * NK * P / rates.bytes


def _product(load: Load, rates: Rates) -> float:
    """G times one vector."""
    d_out, _, P = _sizes(load)
    N, NK, R = load.examples, load.examples * load.columns, load.positions
    if load.plan.form == "formed":
        return 8.0 * P * P / rates.bytes
    if load.plan.form == "dense":
        return 2.0 * load.itemsize * NK * P / rates.bytes
    return 4.0 * N * R * P / rates.product32 + 2.0 * load.itemsize * NK * R * d_out / rates.bytes


def _contraction(load: Load, rates: Rates) -> float:
    """Sum V A V^T over the columns."""
    d_out, d_in, P = _sizes(load)
    N, NK, R = load.examples, load.examples * load.columns, load.positions
    if load.plan.form == "formed":
        return 8.0 * P * P / rates.bytes
    if load.plan.form == "dense":
        return 2.0 * NK * P * (d_in + d_out) / rates.skinny
    weighted = 2.0 * NK * R * R * d_out / rates.skinny if R > 1 else 0.0
    return 2.0 * (N * R * d_in**2 + N * R * R * d_in + NK * R * d_out**2) / rates.product64 + weighted


def _damped(load: Load, small: int, rates: Rates) -> float:
    """Damped steps over the grid, and the conditions at the marked values, which have a bound of their own."""
    if small > DAMPED_SIZE:
        return 0.0
    d_out, d_in, P = _sizes(load)
    step = 1.3 * _product(load, rates) + 8.0 * P * (d_out + d_in) / rates.product64
    vectors = small**3 * max(0.0, 1 / rates.eigenvectors - 1 / rates.eigenvalues)
    if small >= TRIDIAGONAL_FROM and load.plan.form != "formed":
        vectors = 4.0 * TURNED_VECTORS * small**2 / rates.product64
    return vectors + GRID_STEPS * step + min(CONDITION_STEPS * step, CONDITION_FREE / rates.product64)


def _causes(load: Load, small: int, rates: Rates) -> float:
    """The causes of K-FAC's error, where the rows are there and it pays, and the examples' shares of the curvature."""
    _, d_in, P = _sizes(load)
    d_out = P // d_in
    N, K, R = load.examples, load.columns, load.positions
    shares = SHARES_STEPS * 8.0 * small**2 / rates.bytes
    if load.plan.form in ("dense", "formed") and load.itemsize * N * R * (d_in + K * d_out) > ROWS_BYTES:
        return shares
    seconds = 0.0
    for rows in (N * R, N) if R > 1 else (N,):
        # rows that are more than twice the parameters are multiplied with G itself
        whole = load.plan.form == "formed" and N > 2 * P
        operations = 4.0 * rows * K * P**2 if whole else 2.0 * N * K * rows * P
        if operations > SPLIT_FREE:
            continue
        seconds += 4.0 * rows * (K * d_out**2 + d_in**2) / rates.product64
        if whole:
            seconds += operations / rates.product64 + 160.0 * rows * K * P / rates.bytes
        else:
            # every row's gradients against every column's product with its input
            pairs = float(rows) * K * N * K
            seconds += (operations + 4.0 * pairs * d_out) / rates.skinny + 40.0 * pairs / rates.bytes
    return shares + seconds


def _nearest(load: Load, rates: Rates) -> float:
    """kron_best, where it is not skipped for its cost."""
    d_out, d_in, _ = _sizes(load)
    form = load.plan.form
    assert form is not None
    cost, others = nearest_operations(form, d_out, d_in, load.examples * load.columns, load.positions)
    return 0.0 if cost > max(NEAREST_FREE, others) else 2 * NEAREST_STEPS * _contraction(load, rates)


def nearest_operations(form: Form, d_out: int, d_in: int, NK: int, positions: int) -> tuple[float, float]:
    """Operations of the iteration that finds kron_best, and of all other measures of the same block."""
    P = d_out * d_in
    if form in ("outer", "formed"):
        return 0.0, 0.0
    if form == "factored":
        iteration = 4.0 * NK * positions * d_out * (d_out + positions)
        turns = 2.0 * NK * positions * (d_out * d_out + P)
    else:
        iteration = 4.0 * NK * P * (d_out + d_in)
        turns = 2.0 * NK * P * (d_out + d_in)
    return 10 * iteration, 4.0 * NK * NK * P + 4.0 * turns


def loads_of(
    specs: Mapping[str, LayerSpec],
    plan: Plan | Mapping[str, LayerPlan],
    positions: Mapping[str, int],
    *,
    examples: int,
    columns: int,
    draws: bool,
    itemsize: int,
    exact_factors: bool = False,
) -> list[Load]:
    """The sizes of all planned layers; `positions` are those of sites."""
    layers = plan.layers if isinstance(plan, Plan) else plan
    return [
        Load(
            specs[name],
            layer,
            examples,
            columns,
            1 if specs[name].exact_only else sum(positions[site.target] for site in specs[name].sites),
            draws,
            itemsize,
            exact_factors,
        )
        for name, layer in layers.items()
    ]
