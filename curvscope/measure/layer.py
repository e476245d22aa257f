"""All measures of one layer: from what the sweep extracted to its record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.eigen import eigh, eigvalsh
from curvscope.curvature.grouped import GroupedApproximation, GroupedBlock
from curvscope.curvature.kronecker import Approximation, Diagonal, Kronecker
from curvscope.curvature.summed import KroneckerSum
from curvscope.extract.collector import Columns, Extract
from curvscope.extract.plan import PIECE_BYTES, keeps_draws
from curvscope.graph.matrix import to_matrix
from curvscope.measure.accuracy import error_row
from curvscope.measure.approximate import Built, approximate, approximate_tied, follow_nothing, side_by_side
from curvscope.measure.damping import DampingStage, DampingWishes, Subject, not_assessed, why_skipped
from curvscope.measure.draws import factors_of_draws
from curvscope.measure.estimate import estimated_rows, estimated_spectra
from curvscope.measure.layer_signs import layer_signs
from curvscope.measure.sources import not_assessed as no_sources
from curvscope.measure.sources import source_rows
from curvscope.measure.spectrum import (
    STORED,
    Spectrum,
    approximation_spectrum,
    block_spectrum,
    diagonal_spectrum,
    spectrum_row,
    sum_row,
    too_large,
)
from curvscope.measure.terms import FLAVOURS, NO_EKFAC, product, terms
from curvscope.records import (
    NAN,
    DampingRow,
    ErrorRow,
    KroneckerFactors,
    Layer,
    LayerRow,
    RangeRow,
    SourceRow,
    SpectrumRow,
)
from curvscope.settings import APPROXIMATIONS

BIASED = "no error bar but the trace's: eigenvalues of a factor made of few draws are biased, and so are their ratios"
NO_INVERSE = "the weight has several roles: a sum of Kronecker products has no eigenbasis of Kronecker form"
NO_KRONECKER = (
    "no Kronecker form: the parameter is added or multiplied element by element, or used before any example comes in"
)


Keep = Callable[[Extract, Sequence[Block], Sequence[Mapping[str, Built]], str], None]


def keep_nothing(extract: Extract, blocks: Sequence[Block], built: Sequence[Mapping[str, Built]], fisher: str) -> None:
    """Keep nothing of a layer once it is measured."""


@dataclass(frozen=True)
class Wishes:
    """What to measure beyond the default, and what to keep for the file.

    `keep` is shown each layer's extract, its groups' blocks and their approximations (none where there are no exact
    columns), and how its columns were taken, before all of them are let go.
    """

    fisher: str
    measure: tuple[str, ...]
    dump: tuple[str, ...]
    seed: int
    dtype: torch.dtype
    piece_bytes: int = PIECE_BYTES
    keep: Keep = keep_nothing
    damping: DampingWishes = dataclasses.field(default_factory=DampingWishes)
    drawn_factors: bool = False
    no_damping: str = ""


@dataclass
class _Findings:
    """What accumulates while one layer is measured."""

    errors: dict[str, ErrorRow] = dataclasses.field(default_factory=dict)
    spectra: dict[str, SpectrumRow] = dataclasses.field(default_factory=dict)
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    scale: float = 1.0
    sources: dict[str, SourceRow] = dataclasses.field(default_factory=dict)
    damping: list[DampingRow] = dataclasses.field(default_factory=list)
    ranges: list[RangeRow] = dataclasses.field(default_factory=list)

    def add_spectrum(self, layer: str, name: str, spectrum: Spectrum, trace: float) -> None:
        """One matrix's spectrum, brought from the columns' unit to the loss's."""
        spectrum = dataclasses.replace(
            spectrum,
            values=spectrum.values * self.scale,
            raw_max=spectrum.raw_max * self.scale,
            raw_min=spectrum.raw_min * self.scale,
        )
        trace = trace * self.scale
        self.spectra[name] = spectrum_row(layer, name, spectrum, trace)
        limit = spectrum.values.numel() if name == "ggn" else STORED
        # a copy: a view would keep all P of them for as long as the run
        self.values[name] = spectrum.values[:limit].clone().cpu().numpy()
        self.attributes[f"{name}_eigenvalue_raw_max"] = spectrum.raw_max
        self.attributes[f"{name}_eigenvalue_raw_min"] = spectrum.raw_min
        if spectrum.values.numel() > limit:
            self.attributes[f"{name}_eigenvalues_in_all"] = spectrum.values.numel()

    def add_approximation(
        self, layer: str, name: str, given: Approximation | GroupedApproximation | KroneckerSum, dtype: torch.dtype
    ) -> None:
        """An approximation's spectrum, or what is known of it where it is too large."""
        if isinstance(given, KroneckerSum) and too_large(given):
            self.spectra[name] = sum_row(layer, name, given, self.scale)
        else:
            self.add_spectrum(layer, name, approximation_spectrum(given, dtype), given.trace)


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
    factors = {
        key: KroneckerFactors(flavour, A.cpu().numpy(), _scaled(B, scale), role)
        for key, flavour, role, (A, B) in _stored(extract)
    }
    found = _Findings(attributes=_factor_facts(extract, scale), scale=scale)
    eigenvectors: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    blocks = _blocks(extract, wishes.piece_bytes)
    built: Sequence[Mapping[str, Built]] = ()
    if not blocks:
        _not_assessed(spec.name, wishes.fisher, why_no_columns, found, APPROXIMATIONS)
        _factor_spectra(extract, wishes, found)
        if projected is not None:
            _add_projected(extract, projected, wishes, found, why_no_columns)
        found.damping = not_assessed(spec.name, why_no_columns)
    else:
        block: Block | GroupedBlock = blocks[0] if len(blocks) == 1 else GroupedBlock(blocks)
        if wishes.fisher in ("probe", "mc"):
            _estimated(extract, blocks, wishes, found)
            found.damping = not_assessed(spec.name, "steps need exact columns: an estimated block has few of them")
        else:
            built = _exact(extract, blocks, block, wishes, found)
            if "spectra" in wishes.dump and isinstance(block, Block):
                eigenvectors["ggn"] = _eigenvectors(block)
        if "columns" in wishes.dump and blocks[0].columns.form != "formed":
            kept["kept_columns"] = _scaled(block.stacked(), 1 / extract.unit)
        if "blocks" in wishes.dump:
            kept["block"] = _scaled(block.dense(), scale)
    wishes.keep(extract, blocks, built, wishes.fisher)
    if "spectra" in wishes.dump:
        for key, _, _, (A, B) in _stored(extract):
            for which, factor in (("A", A), ("B", B)):
                if factor.ndim > 1:  # those of an embedding's diagonal are the tokens
                    eigenvectors[f"{key}/{which}"] = eigh(factor.double())[1].cpu().numpy()
    if not extract.spec.exact_only and not found.sources:
        found.sources = no_sources(spec.name, why_no_columns or "the exact columns were not taken")
    signs, examples = layer_signs(extract, blocks, found.errors, wishes.seed)
    squares = extract.example_squares
    row = LayerRow(
        name=spec.name,
        kind=spec.kind,
        d_in=spec.d_in,
        d_out=spec.d_out,
        bias=spec.bias is not None,
        groups=spec.groups,
        parameters=spec.parameters,
        examples=extract.examples,
        positions=extract.positions,
        columns=blocks[0].total_columns if blocks else 0,
        better_flavour=_better(extract.single, found.errors),
        padded=extract.padded,
        status="ok" if blocks else "not_assessed",
        reason=why_no_columns,
    )
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
        tokens=_tokens(extract),
        **kept,
    )


def unmeasured(extract: Extract, fisher: str, reason: str) -> Layer:
    """The record of a layer of which nothing could be measured, not even its factors' spectra."""
    spec, found = extract.spec, _Findings()
    _not_assessed(spec.name, fisher, reason, found, APPROXIMATIONS)
    row = LayerRow(
        name=spec.name,
        kind=spec.kind,
        d_in=spec.d_in,
        d_out=spec.d_out,
        bias=spec.bias is not None,
        groups=spec.groups,
        parameters=spec.parameters,
        examples=extract.examples,
        positions=extract.positions,
        columns=0,
        better_flavour="",
        padded=extract.padded,
        status="not_assessed",
        reason=reason,
    )
    factors = {
        key: KroneckerFactors(flavour, A.cpu().numpy(), _scaled(B, extract.unit**-2), role)
        for key, flavour, role, (A, B) in _stored(extract)
    }
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
        tokens=_tokens(extract),
    )


def _stored(extract: Extract) -> list[tuple[str, str, str, tuple[Tensor, Tensor]]]:
    """All factors as (key of Layer.factors, flavour, role, (A, B)), flavour by flavour."""
    roles = extract.roles or {"": extract}
    return [
        (f"{flavour}/{name}" if name else flavour, flavour, name, role.factors[flavour])
        for flavour in FLAVOURS
        for name, role in roles.items()
        if flavour in role.factors
    ]


def _tokens(extract: Extract) -> Any:
    """The tokens that A of reduce runs over, of an embedding."""
    found = [each.tokens for each in (extract, *extract.roles.values()) if each.tokens is not None]
    return found[0].cpu().numpy() if found else None


def _better(single: bool, errors: dict[str, ErrorRow]) -> str:
    """expand, reduce, or same; empty where the errors are unknown."""
    expand, reduce = (errors[f"kfac_{flavour}"].rel_frobenius for flavour in FLAVOURS)
    if np.isnan(expand) or np.isnan(reduce):
        return ""
    if single:
        return "same"
    return "expand" if expand <= reduce else "reduce"


def _scaled(tensor: Tensor, scale: float) -> Any:
    """The tensor in the loss's own unit; in float64 where its own dtype could not hold it."""
    if scale == 1.0:
        return tensor.cpu().numpy()
    exact = tensor.double() * scale
    size = float(exact.abs().max()) if exact.numel() else 0.0
    fits = torch.finfo(tensor.dtype).tiny * 1e8 <= size <= torch.finfo(tensor.dtype).max / 1e8
    return (exact.to(tensor.dtype) if fits else exact).cpu().numpy()


def _factor_facts(extract: Extract, scale: float) -> dict[str, Any]:
    """Trace and raw extreme eigenvalues of every factor, for the file's attributes."""
    facts: dict[str, Any] = {}
    for key, _, _, pair in _stored(extract):
        for name, factor in zip("AB", pair, strict=True):
            exact = factor.double() * (scale if name == "B" else 1.0)
            # a vector is a diagonal
            values = exact if exact.ndim == 1 else eigvalsh(exact)
            facts[f"{key}/{name}/trace"] = float(
                exact.sum() if exact.ndim == 1 else exact.diagonal(dim1=-2, dim2=-1).sum()
            )
            facts[f"{key}/{name}/lambda_max"] = float(values.max())
            facts[f"{key}/{name}/lambda_min"] = float(values.min())
    if extract.gradient is not None:
        facts["gradient_norm"] = float(torch.linalg.norm(extract.gradient.double()))
    return facts


def _not_assessed(layer: str, fisher: str, reason: str, found: _Findings, names: Sequence[str]) -> None:
    for name in names:
        found.errors[name] = ErrorRow(layer, name, fisher, status="not_assessed", reason=reason)


def _group_factors(extract: Extract) -> list[dict[str, tuple[Tensor, Tensor]]]:
    """The factors of every group over the columns' inputs, one dict a group; not for layers of several roles."""
    if extract.spec.groups == 1:
        return [{flavour: (term.A, term.B) for flavour, (term,) in terms(extract).items()}]
    return [{name: (A[i], B[i]) for name, (A, B) in extract.factors.items()} for i in range(extract.spec.groups)]


def _blocks(extract: Extract, piece_bytes: int) -> list[Block]:
    """The exact block of every group; none where there are no columns."""
    spec, columns = extract.spec, extract.columns
    each = [] if columns is None else columns if isinstance(columns, list) else [columns]
    return [Block(one, spec.d_out // spec.groups, extract.width, piece_bytes) for one in each]


def _exact(
    extract: Extract, blocks: list[Block], block: Block | GroupedBlock, wishes: Wishes, found: _Findings
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
        _not_assessed(layer, wishes.fisher, NO_KRONECKER, found, APPROXIMATIONS)
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
        _not_assessed(layer, wishes.fisher, NO_EKFAC, found, [f"ekfac_{flavour}" for flavour in FLAVOURS])
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
            for group, (one, factors) in enumerate(zip(blocks, _group_factors(extract), strict=True))
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


def _add_projected(
    extract: Extract, projected: Mapping[str, Tensor], wishes: Wishes, found: _Findings, reason: str
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


def _steps(extract: Extract, blocks: list[Block], wishes: Wishes, found: _Findings) -> DampingStage | None:
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


def _damped(
    extract: Extract, steps: DampingStage | None, built: dict[str, Built], found: _Findings, refused: str
) -> None:
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


def _factor_spectra(extract: Extract, wishes: Wishes, found: _Findings) -> None:
    """The spectra of both K-FACs, from the factors alone."""
    if extract.roles:
        for flavour, given in terms(extract).items():
            found.add_approximation(extract.spec.name, f"kfac_{flavour}", product(given), wishes.dtype)
        return
    groups = _group_factors(extract)
    for flavour in extract.factors:
        parts = [Kronecker(*factors[flavour]) for factors in groups]
        joined = GroupedApproximation(parts, [part.B.shape[0] for part in parts])
        found.add_spectrum(
            extract.spec.name, f"kfac_{flavour}", approximation_spectrum(joined, wishes.dtype), joined.trace
        )


def _estimated(extract: Extract, blocks: list[Block], wishes: Wishes, found: _Findings) -> None:
    layer = extract.spec.name
    found.errors.update(estimated_rows(layer, wishes.fisher, extract, blocks))
    _factor_spectra(extract, wishes, found)
    for name, row in estimated_spectra(layer, extract, blocks, found.scale).items():
        known = found.spectra.get(name)
        if known is not None:
            reasons = "; ".join(filter(None, (BIASED, known.reason)))
            row = dataclasses.replace(known, trace_stderr=row.trace_stderr, status="estimated", reason=reasons)
        found.spectra[name] = row


def _eigenvectors(block: Block) -> Any:
    """Eigenvectors of G for its nonzero eigenvalues, descending, [P, rank]."""
    vectors = block.eigenpairs[1]
    spectrum = block_spectrum(block)
    rank = spectrum.values.numel()
    leading = vectors.flip(1)[:, :rank]
    if block.columns.form == "formed":
        return leading.cpu().numpy()
    parts: list[Tensor] = [piece.T @ leading for _, _, piece in block.slices()]
    return (torch.cat(parts) / spectrum.values.sqrt()).cpu().numpy()
