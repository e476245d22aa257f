"""What accumulates while one layer is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from curvscope.curvature.grouped import GroupedApproximation
from curvscope.curvature.kronecker import Approximation
from curvscope.curvature.summed import KroneckerSum
from curvscope.measure.spectrum import (
    STORED,
    Spectrum,
    approximation_spectrum,
    spectrum_row,
    sum_row,
    too_large,
)
from curvscope.records import (
    DampingRow,
    ErrorRow,
    RangeRow,
    SourceRow,
    SpectrumRow,
)


@dataclass
class Found:
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

    def without_errors(self, layer: str, fisher: str, reason: str, names: Sequence[str]) -> None:
        """Rows that say why the errors of these approximations are not known."""
        for name in names:
            self.errors[name] = ErrorRow(layer, name, fisher, status="not_assessed", reason=reason)
