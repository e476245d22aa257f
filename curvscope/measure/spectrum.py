"""Eigenvalues and the numbers derived from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.grouped import GroupedApproximation, GroupedBlock
from curvscope.curvature.kronecker import Approximation, Kronecker
from curvscope.records import NAN, SpectrumRow

# More leading eigenvalues of an approximation than this are not stored; the numbers are taken from all of them.
STORED = 16384


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues, descending, numerically nonzero part, with the raw extremes before anything was left out.

    `resolved` is False where the smallest eigenvalues drown in the rounding of float32 factors: then neither the least
    positive one nor the condition is known.
    """

    values: Tensor
    raw_max: float
    raw_min: float
    resolved: bool = True


def block_spectrum(block: Block | GroupedBlock) -> Spectrum:
    """G's nonzero eigenvalues: those above lambda_max * max(P, N K) * eps(float64)."""
    values = block.eigenvalues
    return _nonzero(values, max(block.parameters, block.total_columns) * torch.finfo(torch.float64).eps)


def approximation_spectrum(approximation: Approximation | GroupedApproximation, dtype: torch.dtype) -> Spectrum:
    """M's nonzero eigenvalues.

    An eigenvalue (for a Kronecker product: one of a factor) counts as zero below the largest times n times eps, eps
    that of the dtype the run accumulated in. In float32 what falls below is unresolved rather than zero.
    """
    eps = torch.finfo(dtype).eps
    if isinstance(approximation, GroupedApproximation):
        parts = [approximation_spectrum(part, dtype) for part in approximation.parts]
        values = torch.cat([part.values for part in parts]).sort(descending=True).values
        extremes = max(part.raw_max for part in parts), min(part.raw_min for part in parts)
        return Spectrum(values, *extremes, all(part.resolved for part in parts))
    if isinstance(approximation, Kronecker):
        lam_A, _, lam_B, _ = approximation.bases
        kept_A = lam_A[lam_A > lam_A.max() * lam_A.numel() * eps]
        kept_B = lam_B[lam_B > lam_B.max() * lam_B.numel() * eps]
        values = torch.outer(kept_B, kept_A).flatten().sort(descending=True).values
        corners = torch.outer(lam_B[[0, -1]], lam_A[[0, -1]])
        whole = kept_A.numel() == lam_A.numel() and kept_B.numel() == lam_B.numel()
        return Spectrum(values, float(corners.max()), float(corners.min()), whole or dtype == torch.float64)
    return diagonal_spectrum(approximation.eigenvalues, dtype)


def diagonal_spectrum(diagonal: Tensor, dtype: torch.dtype) -> Spectrum:
    """The spectrum of a matrix that is this diagonal in some basis, from columns in `dtype`."""
    values = diagonal.flatten().sort(descending=True).values
    found = _nonzero(values, values.numel() * torch.finfo(torch.float64).eps)
    noise = values.numel() * torch.finfo(dtype).eps * max(found.raw_max, 0.0)
    return dataclasses.replace(found, resolved=dtype == torch.float64 or found.raw_min > noise)


def _nonzero(values: Tensor, relative: float) -> Spectrum:
    if values.numel() == 0:
        return Spectrum(values, 0.0, 0.0)
    high, low = float(values[0]), float(values[-1])
    return Spectrum(values[values > max(high, 0.0) * relative], high, low)


UNRESOLVED = "the smallest eigenvalues drown in float32 rounding, so the condition is not assessed: --dtype float64"


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
        lambda_min_positive=low if spectrum.resolved else NAN,
        condition=high / low if spectrum.resolved else NAN,
        stable_rank=float((values / high).square().sum()),
        effective_rank=float(torch.exp(-(p * p.log()).sum())),
        reason="" if spectrum.resolved else UNRESOLVED,
    )
