"""All tables of a run, by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from curvscope.records.damping import DampingRow, EvidenceRow, GlobalDampingRow, RangeRow, StepRow
from curvscope.records.layers import CoverageRow, ErrorRow, LayerRow, SourceRow, SpectrumRow
from curvscope.records.verdicts import ExampleRow, FindingRow, StabilityRow

Row = (
    LayerRow
    | CoverageRow
    | ErrorRow
    | SpectrumRow
    | DampingRow
    | RangeRow
    | StepRow
    | GlobalDampingRow
    | EvidenceRow
    | StabilityRow
    | SourceRow
    | ExampleRow
    | FindingRow
)


TABLES: dict[str, type[Row]] = {
    "layers": LayerRow,
    "coverage": CoverageRow,
    "errors": ErrorRow,
    "spectra": SpectrumRow,
    "damping": DampingRow,
    "ranges": RangeRow,
    "steps": StepRow,
    "global_damping": GlobalDampingRow,
    "evidence": EvidenceRow,
    "stability": StabilityRow,
    "sources": SourceRow,
    "examples": ExampleRow,
    "findings": FindingRow,
}


def row_values(row: Row) -> dict[str, Any]:
    """One row as a plain dict, in column order."""
    return {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
