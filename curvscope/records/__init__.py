"""What a run is, in numpy and plain Python: reading one back needs no torch.

A row's `status` is ok, estimated, skipped, not_converged or not_assessed; its `reason` says why.
"""

from curvscope.records.damping import DampingRow, EvidenceRow, GlobalDampingRow, RangeRow, StepRow, leading
from curvscope.records.layers import NAN, CoverageRow, ErrorRow, LayerRow, SourceRow, SpectrumRow
from curvscope.records.run import CONVENTIONS, SCHEMA_VERSION, Array, KroneckerFactors, Layer, ModelInfo, Run, RunInfo
from curvscope.records.tables import TABLES, Row, row_values
from curvscope.records.verdicts import ExampleRow, FindingRow, StabilityRow

__all__ = [
    "CONVENTIONS",
    "NAN",
    "SCHEMA_VERSION",
    "TABLES",
    "Array",
    "CoverageRow",
    "DampingRow",
    "ErrorRow",
    "EvidenceRow",
    "ExampleRow",
    "FindingRow",
    "GlobalDampingRow",
    "KroneckerFactors",
    "Layer",
    "LayerRow",
    "ModelInfo",
    "RangeRow",
    "Row",
    "Run",
    "RunInfo",
    "SourceRow",
    "SpectrumRow",
    "StabilityRow",
    "StepRow",
    "leading",
    "row_values",
]
