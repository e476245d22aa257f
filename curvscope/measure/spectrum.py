"""Eigenvalues and the numbers derived from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.grouped import GroupedApproximation, GroupedBlock
from curvscope.curvature.kronecker import Approximation, Kronecker
from curvscope.records import SpectrumRow

# More leading eigenvalues of an approximation than this are not stored; the numbers are taken from all of them.
STORED = 16384


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues, descending, numerically nonzero part, with the raw extremes before anything was left out."""

    values: Tensor
    raw_max: float
    raw_min: float


def block_spectrum(block: Block | GroupedBlock) -> Spectrum:
    """G's nonzero eigenvalues: those above lambda_max * max(P, N K) * eps(float64)."""
    values = block.eigenvalues
    return _nonzero(values, max(block.parameters, block.total_columns) * torch.finfo(torch.float64).eps)


def approximation_spectrum(approximation: Approximation | GroupedApproximation, dtype: torch.dtype) -> Spectrum:
    """M's nonzero eigenvalues.

    For a Kronecker product an eigenvalue of a factor counts as zero below lambda_max * n * eps of the dtype the
    factor was accumulated in; for the others the rule is that of `block_spectrum`.
    """
    if isinstance(approximation, GroupedApproximation):
        parts = [approximation_spectrum(part, dtype) for part in approximation.parts]
        values = torch.cat([part.values for part in parts]).sort(descending=True).values
        return Spectrum(values, max(part.raw_max for part in parts), min(part.raw_min for part in parts))
    if isinstance(approximation, Kronecker):
        lam_A, _, lam_B, _ = approximation.bases
        eps = torch.finfo(dtype).eps
        kept_A = lam_A[lam_A > lam_A.max() * lam_A.numel() * eps]
        kept_B = lam_B[lam_B > lam_B.max() * lam_B.numel() * eps]
        values = torch.outer(kept_B, kept_A).flatten().sort(descending=True).values
        extremes = torch.outer(lam_B[[0, -1]], lam_A[[0, -1]])
        return Spectrum(values, float(extremes.max()), float(extremes.min()))
    values = approximation.eigenvalues
    return _nonzero(values, values.numel() * torch.finfo(torch.float64).eps)


def _nonzero(values: Tensor, relative: float) -> Spectrum:
    if values.numel() == 0:
        return Spectrum(values, 0.0, 0.0)
    high, low = float(values[0]), float(values[-1])
    return Spectrum(values[values > max(high, 0.0) * relative], high, low)


def spectrum_row(layer: str, name: str, spectrum: Spectrum, trace: float) -> SpectrumRow:
    """tables/spectra for one matrix: trace, extremes, condition, stable rank, effective rank.

    stable_rank = sum lambda^2 / lambda_max^2; effective_rank = exp(-sum p log p), p = lambda / sum lambda
    (Roy and Vetterli 2007).
    """
    values = spectrum.values
    if values.numel() == 0:
        return SpectrumRow(
            layer,
            name,
            trace=trace,
            lambda_max=0.0,
            status="not_assessed",
            reason="no eigenvalue differs from zero",
        )
    high, low = float(values[0]), float(values[-1])
    p = values / values.sum()
    return SpectrumRow(
        layer,
        name,
        trace=trace,
        lambda_max=high,
        lambda_min_positive=low,
        condition=high / low,
        stable_rank=float((values / high).square().sum()),
        effective_rank=float(torch.exp(-(p * p.log()).sum())),
    )
