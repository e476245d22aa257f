"""All measures of one layer: from what the sweep extracted to its record."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.kronecker import (
    Approximation,
    Diagonal,
    EigenCorrected,
    Kronecker,
    nearest_kronecker,
)
from curvscope.extract.sweep import Extract
from curvscope.measure.accuracy import error_row
from curvscope.measure.estimate import estimated_rows
from curvscope.measure.spectrum import STORED, Spectrum, approximation_spectrum, block_spectrum, spectrum_row
from curvscope.records import ErrorRow, KroneckerFactors, Layer, LayerRow, SpectrumRow
from curvscope.settings import APPROXIMATIONS

FLAVOURS = ("expand", "reduce")
# kron_best may always take this many operations; beyond it only as many as the other measures of the layer.
KRON_BEST_FREE = 2e10
KRON_BEST_STEPS = 10
QUICK_ERROR = 0.1


@dataclass(frozen=True)
class Wishes:
    """What to measure beyond the default, and what to keep for the file."""

    fisher: str
    measure: tuple[str, ...]
    dump: tuple[str, ...]
    seed: int
    dtype: torch.dtype


@dataclass
class _Findings:
    """What accumulates while one layer is measured."""

    errors: dict[str, ErrorRow] = dataclasses.field(default_factory=dict)
    spectra: dict[str, SpectrumRow] = dataclasses.field(default_factory=dict)
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add_spectrum(self, layer: str, name: str, spectrum: Spectrum, trace: float) -> None:
        self.spectra[name] = spectrum_row(layer, name, spectrum, trace)
        limit = spectrum.values.numel() if name == "ggn" else STORED
        self.values[name] = spectrum.values[:limit].cpu().numpy()
        self.attributes[f"{name}_eigenvalue_raw_max"] = spectrum.raw_max
        self.attributes[f"{name}_eigenvalue_raw_min"] = spectrum.raw_min
        if spectrum.values.numel() > limit:
            self.attributes[f"{name}_eigenvalues_in_all"] = spectrum.values.numel()


def measure_layer(extract: Extract, wishes: Wishes, *, why_no_columns: str = "") -> Layer:
    """The record of one layer.

    With exact columns every approximation is measured against the exact block; with probe or mc draws the two K-FACs
    and the diagonal get unbiased estimates with standard errors; without columns the errors are not assessed, for
    the reason given.
    """
    spec = extract.spec
    factors = {
        name: KroneckerFactors(name, A.cpu().numpy(), B.cpu().numpy()) for name, (A, B) in extract.factors.items()
    }
    found = _Findings(attributes=_factor_facts(extract))
    eigenvectors: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    if extract.columns is None:
        _not_assessed(spec.name, wishes.fisher, why_no_columns, found, APPROXIMATIONS)
        for name, (A, B) in extract.factors.items():
            kronecker = Kronecker(A, B)
            found.add_spectrum(
                spec.name, f"kfac_{name}", approximation_spectrum(kronecker, wishes.dtype), kronecker.trace
            )
    else:
        block = Block(extract.columns, spec.d_out, spec.d_in + (spec.bias is not None))
        if wishes.fisher in ("probe", "mc"):
            _estimated(extract, block, wishes, found)
        else:
            _exact(extract, block, wishes, found)
        if "spectra" in wishes.dump and wishes.fisher not in ("probe", "mc"):
            eigenvectors["ggn"] = _eigenvectors(block)
        if "columns" in wishes.dump and extract.columns.form != "formed":
            kept["kept_columns"] = block.stacked().cpu().numpy()
        if "blocks" in wishes.dump:
            kept["block"] = block.dense().cpu().numpy()
    if "spectra" in wishes.dump:
        for name, (A, B) in extract.factors.items():
            _, U_A, _, U_B = Kronecker(A, B).bases
            eigenvectors[f"{name}/A"], eigenvectors[f"{name}/B"] = U_A.cpu().numpy(), U_B.cpu().numpy()
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
        columns=extract.columns.count * extract.examples if extract.columns is not None else 0,
        better_flavour=_better(extract.positions, found.errors),
        padded=extract.padded,
        status="ok" if extract.columns is not None else "not_assessed",
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
        **kept,
    )


def _better(positions: float, errors: dict[str, ErrorRow]) -> str:
    """expand, reduce, or same; empty where the errors are unknown."""
    expand, reduce = (errors[f"kfac_{flavour}"].rel_frobenius for flavour in FLAVOURS)
    if np.isnan(expand) or np.isnan(reduce):
        return ""
    if positions == 1:
        return "same"
    return "expand" if expand <= reduce else "reduce"


def _factor_facts(extract: Extract) -> dict[str, Any]:
    """Trace and raw extreme eigenvalues of every factor, for the file's attributes."""
    facts: dict[str, Any] = {}
    for flavour, pair in extract.factors.items():
        for name, factor in zip("AB", pair, strict=True):
            values = torch.linalg.eigvalsh(factor.double())
            facts[f"{flavour}/{name}/trace"] = float(factor.double().trace())
            facts[f"{flavour}/{name}/lambda_max"] = float(values[-1])
            facts[f"{flavour}/{name}/lambda_min"] = float(values[0])
    if extract.gradient is not None:
        facts["gradient_norm"] = float(torch.linalg.norm(extract.gradient.double()))
    return facts


def _not_assessed(layer: str, fisher: str, reason: str, found: _Findings, names: Sequence[str]) -> None:
    for name in names:
        found.errors[name] = ErrorRow(layer, name, fisher, status="not_assessed", reason=reason)


def _exact(extract: Extract, block: Block, wishes: Wishes, found: _Findings) -> None:
    layer = extract.spec.name
    found.add_spectrum(layer, "ggn", block_spectrum(block), block.trace)
    every = "spectral" in wishes.measure
    approximations: dict[str, tuple[Approximation, str]] = {}
    inner: dict[str, float] = {}
    for flavour in FLAVOURS:
        if flavour == "reduce" and extract.positions == 1:
            continue
        kronecker = Kronecker(*extract.factors[flavour])
        approximations[f"kfac_{flavour}"] = (kronecker, _blindness(flavour, extract))
        corrected = _eigen_corrected(kronecker, block)
        approximations[f"ekfac_{flavour}"] = (corrected, _ambiguity(kronecker, wishes.dtype))
        inner[f"kfac_{flavour}"] = corrected.inner
    approximations["diag"] = (Diagonal(block), "")
    expand = approximations["kfac_expand"][0]
    assert isinstance(expand, Kronecker)
    refusal = _kron_best_refusal(block, wishes.measure)
    if refusal:
        found.errors["kron_best"] = ErrorRow(layer, "kron_best", wishes.fisher, status="skipped", reason=refusal)
    else:
        nearest = nearest_kronecker(block, expand, seed=wishes.seed)
        note = "" if nearest.converged else f"its Lanczos iteration had not converged after {nearest.steps} steps"
        approximations["kron_best"] = (nearest.approximation, note)
        inner["kron_best"] = nearest.approximation.inner(block)
    for name, (approximation, reason) in approximations.items():
        found.errors[name] = error_row(
            layer,
            name,
            wishes.fisher,
            block,
            approximation,
            inner=inner.get(name, approximation.norm**2),
            spectral=every or name.startswith("kfac"),
            seed=wishes.seed,
            reason=reason,
        )
        found.add_spectrum(layer, name, approximation_spectrum(approximation, wishes.dtype), approximation.trace)
    if extract.positions == 1:
        # One position an example: both flavours are the same matrix.
        for kind in ("kfac", "ekfac"):
            source, name = f"{kind}_expand", f"{kind}_reduce"
            found.errors[name] = dataclasses.replace(found.errors[source], approximation=name)
            found.spectra[name] = dataclasses.replace(found.spectra[source], approximation=name)
            found.values[name] = found.values[source]
    found.errors = {name: found.errors[name] for name in APPROXIMATIONS}


def _eigen_corrected(kronecker: Kronecker, block: Block) -> EigenCorrected:
    """EKFAC, rotated in the columns' own dtype where both errors are large enough to bear it.

    float32 rotations leave about 1e-6 ||G||^2 in the squared errors: at a relative error of 0.1, its fourth digit.
    """
    quick = EigenCorrected(kronecker, block, fast=True)
    if block.dtype == torch.float64 or block.norm == 0.0:
        return quick
    of_ekfac = 1 - (quick.norm / block.norm) ** 2
    of_kfac = 1 + (kronecker.norm**2 - 2 * quick.inner) / block.norm**2
    return quick if min(of_ekfac, of_kfac) > QUICK_ERROR**2 else EigenCorrected(kronecker, block)


def _estimated(extract: Extract, block: Block, wishes: Wishes, found: _Findings) -> None:
    layer = extract.spec.name
    found.errors.update(estimated_rows(layer, wishes.fisher, extract, block))
    for flavour in FLAVOURS:
        kronecker = Kronecker(*extract.factors[flavour])
        spectrum = approximation_spectrum(kronecker, wishes.dtype)
        found.add_spectrum(layer, f"kfac_{flavour}", spectrum, kronecker.trace)
        row = found.spectra[f"kfac_{flavour}"]
        found.spectra[f"kfac_{flavour}"] = dataclasses.replace(
            row, status="estimated", reason="the eigenvalues of a factor estimated from draws are biased"
        )
    found.spectra["ggn"] = SpectrumRow(
        layer,
        "ggn",
        trace=block.trace,
        status="estimated",
        reason="only the trace: the eigenvalues of a sum of few draws are biased",
    )


def _blindness(flavour: str, extract: Extract) -> str:
    """Says that B of reduce is zero to rounding: the gradients of an example's positions cancel."""
    if flavour == "expand":
        return ""
    expand, reduce = (float(extract.factors[name][1].double().trace()) for name in FLAVOURS)
    eps = torch.finfo(extract.factors["reduce"][1].dtype).eps
    if expand > 0 and reduce <= expand * extract.positions * (100 * eps) ** 2:
        return "B is zero to rounding: the output gradients of an example's positions sum to zero"
    return ""


def _ambiguity(kronecker: Kronecker, dtype: torch.dtype) -> str:
    """Says that the eigenbasis is not unique: a factor has more than one numerically zero eigenvalue."""
    lam_A, _, lam_B, _ = kronecker.bases
    for name, values in (("A", lam_A), ("B", lam_B)):
        zero = int((values <= values.max() * values.numel() * torch.finfo(dtype).eps).sum())
        if zero > 1:
            return f"not unique: {name} has {zero} zero eigenvalues, whose eigenvectors are arbitrary"
    return ""


def _kron_best_refusal(block: Block, measure: tuple[str, ...]) -> str:
    """Why kron_best is skipped: its Lanczos iteration would cost more than everything else; empty if it isn't."""
    if "kron_best" in measure or block.columns.form in ("outer", "formed"):
        return ""
    P, NK, d_out, d_in = block.parameters, block.total_columns, block.d_out, block.d_in
    if block.columns.form == "factored":
        assert block.columns.inputs is not None
        positions = block.columns.inputs.shape[1]
        iteration = 4.0 * NK * positions * d_out * (d_out + positions)
        turns = 2.0 * NK * positions * (d_out * d_out + P)
    else:
        iteration = 4.0 * NK * P * (d_out + d_in)
        turns = 2.0 * NK * P * (d_out + d_in)
    cost = KRON_BEST_STEPS * iteration
    others = 4.0 * NK * NK * P + 4.0 * turns
    if cost <= max(KRON_BEST_FREE, others):
        return ""
    return (
        f"its iteration would take about {cost / 1e9:.0f} GFLOP, the layer's other measures {others / 1e9:.0f}; "
        "--measure kron_best computes it all the same"
    )


def _eigenvectors(block: Block) -> Any:
    """Eigenvectors of G for its nonzero eigenvalues, descending, [P, rank]."""
    vectors = torch.linalg.eigh(block.gram).eigenvectors
    spectrum = block_spectrum(block)
    rank = spectrum.values.numel()
    leading = vectors.flip(1)[:, :rank]
    if block.columns.form == "formed":
        return leading.cpu().numpy()
    parts: list[Tensor] = [piece.T @ leading for _, _, piece in block.slices()]
    return (torch.cat(parts) / spectrum.values.sqrt()).cpu().numpy()
