"""All measures of one layer: from what the sweep extracted to its record."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.eigen import eigh
from curvscope.curvature.grouped import GroupedApproximation, GroupedBlock
from curvscope.curvature.kronecker import Kronecker
from curvscope.extract.collector import Columns, Extract
from curvscope.extract.plan import keeps_draws
from curvscope.measure.approximate import Built
from curvscope.measure.damping import not_assessed
from curvscope.measure.drawn_signs import Draws
from curvscope.measure.draws import factors_of_draws
from curvscope.measure.estimate import estimated_errors, estimated_spectra, no_bars
from curvscope.measure.exact_layer import against_exact, blocks_of, eigenvectors_of, group_factors
from curvscope.measure.factor_estimate import FactorOfDraws, spectrum_estimates, with_errors
from curvscope.measure.found import Found
from curvscope.measure.layer_facts import (
    better_flavour,
    factor_facts,
    factor_records,
    in_loss_unit,
    layer_row,
    stored_factors,
    tokens_of,
)
from curvscope.measure.layer_signs import layer_signs
from curvscope.measure.sources import not_assessed as no_sources
from curvscope.measure.spectrum import (
    approximation_spectrum,
    diagonal_spectrum,
)
from curvscope.measure.terms import product, terms
from curvscope.measure.wishes import Wishes
from curvscope.records import (
    NAN,
    Layer,
    SpectrumRow,
)
from curvscope.settings import APPROXIMATIONS


def measure_layer(
    extract: Extract, wishes: Wishes, *, why_no_columns: str = "", projected: Mapping[str, Tensor] | None = None
) -> Layer:
    """The record of one layer.

    With exact columns every approximation is measured against the exact block; with probe or mc draws the two K-FACs
    and the diagonal get unbiased estimates with standard errors; without columns the errors are not assessed, for
    the reason given, but for what follows from the diagonals of `projected` (see `curvscope.extract.projected`).
    """
    spec, columns = extract.spec, extract.columns
    if wishes.drawn_factors and isinstance(columns, Columns) and not keeps_draws(columns.form):
        extract = dataclasses.replace(extract, probe_B=factors_of_draws(columns))
    scale = extract.unit**-2
    factors = factor_records(extract)
    blocks = blocks_of(extract, wishes.piece_bytes)
    draws = _draws(extract, blocks, wishes)
    eps = torch.finfo(wishes.dtype).eps
    drawn = {} if draws is not None and draws.refused else FactorOfDraws.every(extract, eps)
    found = Found(attributes=factor_facts(extract, scale, drawn), scale=scale)
    eigenvectors: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    built: Sequence[Mapping[str, Built]] = ()
    better = ""
    if not blocks:
        found.without_errors(spec.name, wishes.fisher, why_no_columns, APPROXIMATIONS)
        _factor_spectra(extract, wishes, found)
        if projected is not None:
            _add_projected(extract, projected, wishes, found, why_no_columns)
        found.damping = not_assessed(spec.name, why_no_columns)
    else:
        block: Block | GroupedBlock = blocks[0] if len(blocks) == 1 else GroupedBlock(blocks)
        if wishes.fisher in ("probe", "mc"):
            better = _estimated(extract, blocks, wishes, found, drawn)
            found.damping = not_assessed(spec.name, "steps need exact columns: an estimated block has few of them")
        else:
            built = against_exact(extract, blocks, block, wishes, found)
            better = better_flavour(extract.single, found.errors)
            if "spectra" in wishes.dump and isinstance(block, Block):
                eigenvectors["ggn"] = eigenvectors_of(block)
        if "columns" in wishes.dump and blocks[0].columns.form != "formed":
            kept["kept_columns"] = in_loss_unit(block.stacked(), 1 / extract.unit)
        if "blocks" in wishes.dump:
            kept["block"] = in_loss_unit(block.dense(), scale)
    wishes.keep(extract, blocks, built, wishes.fisher)
    if "spectra" in wishes.dump:
        for key, _, _, (A, B) in stored_factors(extract):
            for which, factor in (("A", A), ("B", B)):
                if factor.ndim > 1:  # those of an embedding's diagonal are the tokens
                    eigenvectors[f"{key}/{which}"] = eigh(factor.double())[1].cpu().numpy()
    if not extract.spec.exact_only and not found.sources:
        found.sources = no_sources(spec.name, why_no_columns or "the exact columns were not taken")
    signs, examples = layer_signs(extract, blocks, found.errors, wishes.seed, draws, drawn.get(("", "expand")))
    squares = extract.example_squares
    row = layer_row(extract, blocks[0].total_columns if blocks else 0, better, why_no_columns)
    return Layer(
        row=row,
        factors=factors,
        spectrum=found.values,
        errors=found.errors,
        spectra=found.spectra,
        eigenvectors=eigenvectors,
        attributes=found.attributes,
        sources=found.sources,
        signs=signs,
        examples=examples,
        example_gradients=None if squares is None else squares.cpu().numpy(),
        damping=found.damping,
        ranges=found.ranges,
        tokens=tokens_of(extract),
        **kept,
    )


def unmeasured(extract: Extract, fisher: str, reason: str) -> Layer:
    """The record of a layer of which nothing could be measured, not even its factors' spectra."""
    spec, found = extract.spec, Found()
    found.without_errors(spec.name, fisher, reason, APPROXIMATIONS)
    row = layer_row(extract, 0, "", reason)
    factors = factor_records(extract)
    return Layer(
        row=row,
        factors=factors,
        spectrum={},
        errors=found.errors,
        spectra={},
        eigenvectors={},
        attributes={},
        sources={} if spec.exact_only else no_sources(spec.name, reason),
        damping=not_assessed(spec.name, reason),
        tokens=tokens_of(extract),
    )


def _draws(extract: Extract, blocks: Sequence[Block], wishes: Wishes) -> Draws | None:
    """How the columns were drawn; None where they are exact, or not there."""
    if not blocks or wishes.fisher not in ("probe", "mc"):
        return None
    count = blocks[0].columns.count
    return Draws(wishes.fisher, count, no_bars(extract, count))


def _add_projected(
    extract: Extract, projected: Mapping[str, Tensor], wishes: Wishes, found: Found, reason: str
) -> None:
    """Trace ratios, the trace of G, and the spectra of EKFAC and the diagonal, all without columns.

    The trace ratio of K-FAC is `tr A tr B / tr G`; the eigenvalues of EKFAC and of the diagonal are the projected
    diagonals. Errors and cosines need ||G||, which does not add over columns: they stay not assessed.
    """
    layer = extract.spec.name
    trace = float(projected["diag"].sum())
    found.spectra["ggn"] = SpectrumRow(
        layer, "ggn", trace=trace * found.scale, status="not_assessed", reason=f"only the trace: {reason}"
    )
    if trace == 0.0:
        return
    for name in found.errors:
        kind, _, flavour = name.partition("_")
        flavour = "expand" if extract.positions == 1 else flavour
        ratio = NAN
        if kind == "kfac":
            A, B = extract.factors[flavour]
            ratio = float(A.double().trace() * B.double().trace()) / trace
        elif kind in ("ekfac", "diag"):
            values = projected["diag" if kind == "diag" else flavour]
            ratio = float(values.sum()) / trace
            spectrum = diagonal_spectrum(values, wishes.dtype)
            found.add_spectrum(layer, name, spectrum, float(values.sum()))
        why = f"{reason}; without columns ||G|| is not known, and so of its errors only the trace ratio"
        found.errors[name] = dataclasses.replace(found.errors[name], trace_ratio=ratio, reason=why)


def _factor_spectra(extract: Extract, wishes: Wishes, found: Found) -> None:
    """The spectra of both K-FACs, from the factors alone."""
    if extract.roles:
        for flavour, given in terms(extract).items():
            found.add_approximation(extract.spec.name, f"kfac_{flavour}", product(given), wishes.dtype)
        return
    groups = group_factors(extract)
    for flavour in extract.factors:
        parts = [Kronecker(*factors[flavour]) for factors in groups]
        joined = GroupedApproximation(parts, [part.B.shape[0] for part in parts])
        found.add_spectrum(
            extract.spec.name, f"kfac_{flavour}", approximation_spectrum(joined, wishes.dtype), joined.trace
        )


def _estimated(
    extract: Extract,
    blocks: list[Block],
    wishes: Wishes,
    found: Found,
    of_B: Mapping[tuple[str, str], FactorOfDraws | None],
) -> str:
    """All measures of a layer whose columns are draws; what comes back is the better K-FAC."""
    layer = extract.spec.name
    errors = estimated_errors(layer, wishes.fisher, extract, blocks)
    found.errors.update(errors.rows)
    _factor_spectra(extract, wishes, found)
    known, refused = terms(extract), no_bars(extract, blocks[0].columns.count)
    for name, row in estimated_spectra(layer, extract, blocks, found.scale).items():
        if name in found.spectra:
            flavour = name.removeprefix("kfac_")
            given = known[flavour]
            several = len(given) > 1 or bool(refused)
            numbers = None if several else spectrum_estimates(given[0], of_B.get((given[0].role, flavour)))
            drawn = with_errors(found.spectra[name], numbers, found.scale)
            reason = "; ".join(filter(None, (refused, drawn.reason)))
            row = dataclasses.replace(drawn, trace_stderr=row.trace_stderr, reason=reason)
        found.spectra[name] = row
    return errors.better
