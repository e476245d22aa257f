"""Everything that is measured of a layer against its exact block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.grouped import GroupedApproximation, GroupedBlock
from curvscope.curvature.kronecker import Diagonal
from curvscope.curvature.summed import KroneckerSum
from curvscope.extract.collector import Extract
from curvscope.graph.matrix import to_matrix
from curvscope.measure.accuracy import error_row
from curvscope.measure.approximate import Built, approximate, approximate_tied, follow_nothing, side_by_side
from curvscope.measure.damping import DampingStage, Subject, not_assessed, why_skipped
from curvscope.measure.found import Found
from curvscope.measure.sources import source_rows
from curvscope.measure.spectrum import (
    approximation_spectrum,
    block_spectrum,
)
from curvscope.measure.terms import FLAVOURS, NO_EKFAC, terms
from curvscope.measure.wishes import Wishes
from curvscope.records import (
    DampingRow,
    ErrorRow,
)
from curvscope.settings import APPROXIMATIONS

NO_INVERSE = "the weight has several roles: a sum of Kronecker products has no eigenbasis of Kronecker form"


NO_KRONECKER = (
    "no Kronecker form: the parameter is added or multiplied element by element, or used before any example comes in"
)


def blocks_of(extract: Extract, piece_bytes: int) -> list[Block]:
    """The exact block of every group; none where there are no columns."""
    spec, columns = extract.spec, extract.columns
    each = [] if columns is None else columns if isinstance(columns, list) else [columns]
    return [Block(one, spec.d_out // spec.groups, extract.width, piece_bytes) for one in each]


def group_factors(extract: Extract) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """The factors of every group over the columns' inputs, one dict a group; not for layers of several roles."""
    if extract.spec.groups == 1:
        return [{flavour: (term.A, term.B) for flavour, (term,) in terms(extract).items()}]
    return [{name: (A[i], B[i]) for name, (A, B) in extract.factors.items()} for i in range(extract.spec.groups)]


def against_exact(
    extract: Extract, blocks: list[Block], block: Block | GroupedBlock, wishes: Wishes, found: Found
) -> Sequence[Mapping[str, Built]]:
    """All measures against the exact block; what comes back are the approximations of each group."""
    layer = extract.spec.name
    steps_refused = wishes.no_damping or why_skipped(blocks, wishes.damping.always)
    # first of all: the spectrum then takes its eigenvalues from the decomposition, instead of computing them alone
    steps = None if steps_refused else _steps(extract, blocks, wishes, found)
    found.add_spectrum(layer, "ggn", block_spectrum(block), block.trace)
    every = "spectral" in wishes.measure
    if extract.spec.exact_only:
        assert isinstance(block, Block)
        found.without_errors(layer, wishes.fisher, NO_KRONECKER, APPROXIMATIONS)
        diagonal = Diagonal(block)
        found.errors["diag"] = error_row(
            layer, "diag", wishes.fisher, block, diagonal, inner=diagonal.norm**2, spectral=every, seed=wishes.seed
        )
        found.add_spectrum(layer, "diag", approximation_spectrum(diagonal, wishes.dtype), diagonal.trace)
        built = {"diag": Built(diagonal, diagonal.norm**2)}
        _damped(extract, steps, built, found, steps_refused)
        return ()
    best = "kron_best" in wishes.measure
    if extract.roles:
        parts = [approximate_tied(blocks[0], terms(extract), single=extract.single, seed=wishes.seed, every=best)]
        found.without_errors(layer, wishes.fisher, NO_EKFAC, [f"ekfac_{flavour}" for flavour in FLAVOURS])
    else:
        parts = [
            approximate(
                one,
                factors,
                positions=extract.positions,
                dtype=wishes.dtype,
                seed=wishes.seed,
                every=best,
                follow=follow_nothing if steps is None else partial(steps.follow, group),
            )
            for group, (one, factors) in enumerate(zip(blocks, group_factors(extract), strict=True))
        ]
    refusal = next((reason for _, reason in parts if reason), "")
    built = dict(parts[0][0])
    if not isinstance(block, GroupedBlock):
        found.sources = source_rows(extract, block, built, every="split" in wishes.measure)
    if len(parts) > 1:
        built = side_by_side([part for part, _ in parts], [one.d_out for one in blocks])
    if refusal:
        built.pop("kron_best", None)
        found.errors["kron_best"] = ErrorRow(layer, "kron_best", wishes.fisher, status="skipped", reason=refusal)
    for name, one in built.items():
        found.errors[name] = error_row(
            layer,
            name,
            wishes.fisher,
            block,
            one.approximation,
            inner=one.inner,
            spectral=every or name.startswith("kfac"),
            seed=wishes.seed,
            reason=one.note,
        )
        found.add_approximation(layer, name, one.approximation, wishes.dtype)
    _damped(extract, steps, built, found, steps_refused)
    if extract.single:
        # One position an example: both flavours are the same matrix.
        for kind in ("kfac", "ekfac"):
            source, name = f"{kind}_expand", f"{kind}_reduce"
            found.errors[name] = dataclasses.replace(found.errors[source], approximation=name)
            if source in found.spectra:
                found.spectra[name] = dataclasses.replace(found.spectra[source], approximation=name)
            if source in found.values:
                found.values[name] = found.values[source]
            found.damping += [
                dataclasses.replace(r, approximation=name) for r in found.damping if r.approximation == source
            ]
            found.ranges += [
                dataclasses.replace(r, approximation=name) for r in found.ranges if r.approximation == source
            ]
        order = ("ggn", *APPROXIMATIONS)
        found.damping.sort(key=lambda row: order.index(row.approximation))
        found.ranges.sort(key=lambda row: order.index(row.approximation))
    found.errors = {name: found.errors[name] for name in APPROXIMATIONS}
    return [part for part, _ in parts]


def _steps(extract: Extract, blocks: list[Block], wishes: Wishes, found: Found) -> DampingStage | None:
    """The damping stage of a layer with exact columns; None where its gradient was not kept."""
    spec, asked = extract.spec, wishes.damping
    if extract.gradient is None:
        return None
    decay = asked.decay.get(spec.name, 0.0)
    weights = to_matrix(spec, asked.weights) if decay else None
    if weights is not None and extract.tokens is not None:
        weights = weights[:, extract.tokens]
    return DampingStage(
        Subject(
            layer=spec.name,
            blocks=blocks,
            gradient=extract.gradient.reshape(-1, blocks[0].d_in),
            scale=found.scale,
            dtype=wishes.dtype,
            current=asked.current.get(spec.name),
            decay=decay,
            weights=weights,
            seed=wishes.seed,
            always=asked.always,
            remark=asked.remarks.get(spec.name, ""),
            inputs=0 if extract.tokens is None else spec.d_in,
        )
    )


def _damped(extract: Extract, steps: DampingStage | None, built: dict[str, Built], found: Found, refused: str) -> None:
    """tables/damping and tables/ranges of a layer with exact columns."""
    layer = extract.spec.name
    if steps is None:
        reason = refused or "the layer's gradient was not kept"
        found.damping = not_assessed(layer, reason, "skipped" if refused else "not_assessed")
        return
    sums = [name for name, one in built.items() if isinstance(one.approximation, KroneckerSum)]
    built = {name: one for name, one in built.items() if name not in sums}
    approximations: dict[str, list[Any]] = {
        name: list(one.approximation.parts)
        if isinstance(one.approximation, GroupedApproximation)
        else [one.approximation]
        for name, one in built.items()
    }
    blind = [name for name, one in built.items() if name.startswith("kfac") and one.note]
    found.damping, found.ranges = steps.tables(approximations, blind)
    found.damping += [DampingRow(layer, name, "eigenbasis", status="not_assessed", reason=NO_INVERSE) for name in sums]


def eigenvectors_of(block: Block) -> Any:
    """Eigenvectors of G for its nonzero eigenvalues, descending, [P, rank]."""
    vectors = block.eigenpairs[1]
    spectrum = block_spectrum(block)
    rank = spectrum.values.numel()
    leading = vectors.flip(1)[:, :rank]
    if block.columns.form == "formed":
        return leading.cpu().numpy()
    parts: list[Tensor] = [piece.T @ leading for _, _, piece in block.slices()]
    return (torch.cat(parts) / spectrum.values.sqrt()).cpu().numpy()
