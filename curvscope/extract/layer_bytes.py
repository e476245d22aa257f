"""What measuring one layer takes in bytes, beside its kept columns and the slices that everything is worked on in.

Measures run one after the other. What stays throughout (the factors' eigenbases, the scales of the approximations, the
Gram matrix) is there in each; of what comes and goes the largest counts. A square is a float64 matrix over the smaller
side of the block, min(P, N K).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from curvscope.extract.collector import Form

# Rows kept beside columns of another form, in all.
ROWS_BYTES = 64 * 2**20
# Matrices of all pairs of draws: products among blocks and what approximates them, and what is made of these.
PAIRED = 6
# A Lanczos basis has at least so many vectors; products and residuals beside it.
LEAST_BASIS = 20
VECTORS_BESIDE = 8
# Squares that the eigenvectors of one take beside it, as measured (LAPACK's work space, copies).
EIGENVECTORS = 5
# Dampings of the grid, with the decades up to the largest eigenvalue; three matrices a flavour are followed over it.
GRID = 16
FOLLOWED = 3


@dataclass(frozen=True)
class Sizes:
    """One layer (or one group of it) by its sizes: d_in counts the bias, K are columns an example, R positions.

    `factored` says that it has Kronecker factors, `draws` that its block is estimated from draws.
    """

    d_out: int
    d_in: int
    examples: int
    columns: int
    positions: int
    itemsize: int
    factored: bool = True
    draws: bool = False

    @property
    def parameters(self) -> int:
        """P."""
        return self.d_out * self.d_in

    @property
    def small(self) -> int:
        """The smaller side of the block; of draws N K."""
        NK = self.examples * self.columns
        return NK if self.draws else min(self.parameters, NK)

    @property
    def square(self) -> int:
        """Bytes of a float64 matrix over it."""
        return 8 * self.small**2


def measure_bytes(form: Form, sizes: Sizes, slices: int) -> int:
    """Everything but damped steps, with `slices` bytes for what is worked on in slices."""
    # eigenvalues take two squares; G itself in EKFAC's basis as many, and one contraction
    alone = 2 * sizes.square + (8 * sizes.parameters * sizes.d_in if form == "formed" else 0)
    if sizes.draws:
        alone = _of_formed_draws(sizes) if form == "formed" else 0
    return _stays(form, sizes) + max(alone, _in_slices(form, sizes, slices))


def _of_formed_draws(sizes: Sizes) -> int:
    """G of all draws, products with a basis of A, and what these leave of every draw's G (two of its axes diagonal)."""
    P = sizes.parameters
    return 8 * (3 * P * P + sizes.columns * sizes.d_out * P)


def damped_bytes(form: Form, sizes: Sizes, slices: int) -> int:
    """The same with damped steps: eigenvectors, twice as they are sorted, and scales and sides in every basis."""
    scales = 8 * sizes.parameters * (4 * _flavours(sizes) + 11)
    # steps of one matrix over the grid, and the products of all that are followed with the columns (or with G)
    steps = GRID * sizes.parameters * sizes.itemsize if sizes.factored else 0
    products = sizes.parameters if form == "formed" else sizes.examples * sizes.columns
    steps += 8 * GRID * FOLLOWED * _flavours(sizes) * products
    beside = 2 * sizes.square + scales + steps + _in_slices(form, sizes, slices)
    return _stays(form, sizes) + max(EIGENVECTORS * sizes.square, beside)


def _flavours(sizes: Sizes) -> int:
    return (1 if sizes.positions == 1 else 2) if sizes.factored else 0


def _stays(form: Form, sizes: Sizes) -> int:
    """What is there while all measures run: eigenbases, scales, and the Gram matrix where it is not G that is kept."""
    kinds = _flavours(sizes)
    bases = 16 * (kinds + 1) * (sizes.d_in**2 + sizes.d_out**2) if sizes.factored else 0
    return bases + 8 * sizes.parameters * (2 * kinds + 1) + (0 if form == "formed" else sizes.square)


def _in_slices(form: Form, sizes: Sizes, slices: int) -> int:
    """The largest of what runs in slices: Lanczos, the splits and signs that read rows, draws."""
    P, rows = sizes.parameters, sizes.examples * sizes.positions
    vectors = 8 * P * VECTORS_BESIDE + max(slices, 8 * P * LEAST_BASIS)
    beside = form == "formed" and sizes.itemsize * rows * (sizes.d_in + sizes.columns * sizes.d_out) > ROWS_BYTES
    none = form == "dense" or beside  # rows that large are not kept beside G
    of_rows = 0 if none else 2 * sizes.itemsize * rows * sizes.d_in + 12 * rows * sizes.d_out
    return max(vectors, slices + of_rows, slices + _of_draws(form, sizes) if sizes.draws else 0)


def dumped_bytes(sizes: Sizes, dump: Collection[str]) -> int:
    """What --dump keeps of the layer until the run is saved."""
    P, d_in, d_out = sizes.parameters, sizes.d_in, sizes.d_out
    found = 0
    if "columns" in dump:
        found += sizes.examples * sizes.columns * P * sizes.itemsize
    if "blocks" in dump:
        found += 8 * P * P
    if "spectra" in dump:
        found += 8 * P * sizes.small + 16 * sizes.factored * (d_in**2 + d_out**2)
    return found


def _of_draws(form: Form, sizes: Sizes) -> int:
    """B of each draw (both flavours, one of them in float64, half of that again), products of pairs, columns turned."""
    factors = sizes.columns * sizes.d_out**2 * (_flavours(sizes) * sizes.itemsize + 12) if sizes.factored else 0
    factors += 8 * PAIRED * sizes.columns**2
    half = (sizes.columns + 1) // 2
    if form == "formed":
        return factors
    if form == "dense":
        return factors + 8 * (sizes.columns + 2) * sizes.examples * sizes.parameters
    rows = sizes.examples * sizes.positions
    return factors + rows * (sizes.d_in * 16 + half * sizes.d_out * (sizes.itemsize + 16))
