"""All approximations of one block, each with <G, M> and what a reader has to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.grouped import GroupedApproximation
from curvscope.curvature.kronecker import Approximation, Diagonal, EigenCorrected, Kronecker, nearest_kronecker
from curvscope.curvature.summed import KroneckerSum
from curvscope.curvature.tiles import Watch
from curvscope.extract.cost import NEAREST_FREE, nearest_operations
from curvscope.measure.terms import FLAVOURS, Term, product

QUICK_ERROR = 0.1

Factors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Built:
    """An approximation, <G, M>, and in words what is special about it (empty: nothing)."""

    approximation: Approximation | GroupedApproximation | KroneckerSum
    inner: float
    note: str = ""


# Makes the watch of one pass over the columns in the basis of a flavour's K-FAC; None: nobody watches it.
Follow = Callable[[str, Kronecker], Watch | None]


def follow_nothing(flavour: str, kronecker: Kronecker) -> None:
    """Nobody watches EKFAC's pass."""


def approximate(
    block: Block,
    factors: Factors,
    *,
    positions: float,
    dtype: torch.dtype,
    seed: int,
    every: bool,
    follow: Follow = follow_nothing,
) -> tuple[dict[str, Built], str]:
    """The approximations of one block by name, and why kron_best is not among them (empty: it is).

    With one position an example the two flavours are the same matrix, and only expand is built. `follow` is asked
    before the pass of an EKFAC in the columns' own dtype; one in float64 that may come after it is not shown.
    """
    built: dict[str, Built] = {}
    for flavour in FLAVOURS:
        if flavour == "reduce" and positions == 1:
            continue
        kronecker = Kronecker(*factors[flavour])
        corrected = _eigen_corrected(kronecker, block, flavour, follow)
        built[f"kfac_{flavour}"] = Built(kronecker, corrected.inner, blindness(flavour, factors, positions))
        built[f"ekfac_{flavour}"] = Built(corrected, corrected.norm**2, _ambiguity(kronecker, dtype))
    return built, _of_the_block(block, Kronecker(*factors["expand"]), built, seed, every)


def approximate_tied(
    block: Block, given: Mapping[str, Sequence[Term]], *, single: bool, seed: int, every: bool
) -> tuple[dict[str, Built], str]:
    """As `approximate`, for a weight of several roles: each K-FAC is the sum of the roles', and there is no EKFAC.

    `single` says that every role has one position an example.
    """
    built: dict[str, Built] = {}
    for flavour in FLAVOURS:
        if flavour == "reduce" and single:
            continue
        total = product(given[flavour])
        built[f"kfac_{flavour}"] = Built(total, total.inner(block), blind_roles(flavour, given))
    return built, _of_the_block(block, given["expand"][0].product, built, seed, every)


def _of_the_block(block: Block, start: Kronecker, built: dict[str, Built], seed: int, every: bool) -> str:
    """Adds what follows from the block alone; why kron_best is skipped, if it is."""
    diagonal = Diagonal(block)
    built["diag"] = Built(diagonal, diagonal.norm**2)
    refusal = "" if every else _kron_best_refusal(block)
    if not refusal:
        nearest = nearest_kronecker(block, start, seed=seed)
        note = "" if nearest.converged else f"its Lanczos iteration had not converged after {nearest.steps} steps"
        built["kron_best"] = Built(nearest.approximation, nearest.approximation.inner(block), note)
    return refusal


def side_by_side(parts: Sequence[dict[str, Built]], outputs: Sequence[int]) -> dict[str, Built]:
    """The approximations of several groups as those of their block-diagonal matrix."""
    joined = {}
    for name in parts[0]:
        if all(name in part for part in parts):
            each = [part[name] for part in parts]
            approximations = [
                one.approximation
                for one in each
                if not isinstance(one.approximation, GroupedApproximation | KroneckerSum)
            ]
            notes = list(dict.fromkeys(one.note for one in each if one.note))
            joined[name] = Built(
                GroupedApproximation(approximations, outputs), sum(one.inner for one in each), "; ".join(notes[:1])
            )
    return joined


def _eigen_corrected(kronecker: Kronecker, block: Block, flavour: str, follow: Follow) -> EigenCorrected:
    """EKFAC, rotated in the columns' own dtype where both errors are large enough to bear it.

    float32 rotations leave about 1e-6 ||G||^2 in the squared errors: at a relative error of 0.1, its fourth digit.
    """
    quick = EigenCorrected(kronecker, block, fast=True, watch=follow(flavour, kronecker))
    if block.dtype == torch.float64 or block.norm == 0.0:
        return quick
    of_ekfac = 1 - (quick.norm / block.norm) ** 2
    of_kfac = 1 + (kronecker.norm**2 - 2 * quick.inner) / block.norm**2
    if min(of_ekfac, of_kfac) > QUICK_ERROR**2:
        return quick
    return EigenCorrected(kronecker, block)


def blindness(flavour: str, factors: Factors, positions: float) -> str:
    """Says that B of reduce is zero to rounding, in all groups: the gradients of an example's positions cancel."""
    if flavour == "expand":
        return ""
    expand, reduce = (float(factors[name][1].double().diagonal(dim1=-2, dim2=-1).sum()) for name in FLAVOURS)
    eps = torch.finfo(factors["reduce"][1].dtype).eps
    if expand > 0 and reduce <= expand * positions * (100 * eps) ** 2:
        return "B is zero to rounding: the output gradients of an example's positions sum to zero"
    return ""


def blind_roles(flavour: str, given: Mapping[str, Sequence[Term]]) -> str:
    """The same for every role of a weight that has several."""
    notes = []
    for expand, reduce in zip(given["expand"], given["reduce"], strict=True):
        factors = {"expand": (expand.A, expand.B), "reduce": (reduce.A, reduce.B)}
        note = blindness(flavour, factors, expand.positions)
        notes += [f"{expand.role}: {note}" if expand.role else note] if note else []
    return "; ".join(notes)


def _ambiguity(kronecker: Kronecker, dtype: torch.dtype) -> str:
    """Says that the eigenbasis is not unique: a factor has more than one numerically zero eigenvalue."""
    lam_A, _, lam_B, _ = kronecker.bases
    for name, values in (("A", lam_A), ("B", lam_B)):
        zero = int((values <= values.max() * values.numel() * torch.finfo(dtype).eps).sum())
        if zero > 1:
            return f"not unique: {name} has {zero} zero eigenvalues, whose eigenvectors are arbitrary"
    return ""


def _kron_best_refusal(block: Block) -> str:
    """Why kron_best is skipped: its Lanczos iteration would cost more than everything else; empty if it isn't."""
    columns = block.columns
    positions = 1 if columns.inputs is None else columns.inputs.shape[1]
    cost, others = nearest_operations(columns.form, block.d_out, block.d_in, block.total_columns, positions)
    if cost <= max(NEAREST_FREE, others):
        return ""
    return (
        f"its iteration would take about {cost / 1e9:.0f} GFLOP, the layer's other measures {others / 1e9:.0f}; "
        "--measure kron_best computes it all the same"
    )
