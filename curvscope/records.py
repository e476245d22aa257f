"""What a run is, in numpy and plain Python: reading one back needs no torch.

Conventions (vec order, where 1/N sits) are those of `CONVENTIONS`; nothing else states them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy.typing as npt

Array = npt.NDArray[Any]
Status = Literal["ok", "estimated", "skipped", "not_converged", "not_assessed"]

SCHEMA_VERSION = "1.0"
NAN = float("nan")

CONVENTIONS = {
    "vec": "row-major over [d_out, d_in(+1)]: index = out * (d_in + bias) + in; the bias is the last input, "
    "a constant 1",
    "scale": "the scale of the loss exactly as trained (its reduction, weights and smoothing included)",
    "expand": "A = sum_{n,r} a a^T / sum_n R_n, B = sum_{n,k,r} g g^T; the approximation of the block is kron(B, A)",
    "reduce": "A = (1/N) sum_n abar abar^T, abar = mean over positions; B = sum_{n,k} gsum gsum^T, gsum = sum over "
    "positions; the approximation of the block is kron(B, A)",
    "ggn": "G = sum_{n,k} v v^T with v[n,k] = vec(sum_r g[n,k,r] a[n,r]^T)",
}


@dataclass(frozen=True)
class LayerRow:
    """One layer: a weight, with the bias that belongs to it.

    `positions` is the mean number of real positions an example (R_n), `padded` the share of rows that were
    found to be padding and left out, `columns` the number of GGN columns (N times K).
    """

    name: str
    kind: str
    d_in: int
    d_out: int
    bias: bool
    groups: int
    parameters: int
    examples: int
    positions: float
    columns: int
    better_flavour: str
    padded: float = 0.0
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class CoverageRow:
    """One parameter tensor and how it is treated: kronecker, exact_only, frozen or uncovered."""

    parameter: str
    layer: str
    count: int
    treatment: str
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class ErrorRow:
    """How far one approximation M of one layer's block G is from it.

    rel_frobenius = ||G - M||_F / ||G||_F; cosine = <G, M> / (||G||_F ||M||_F); trace_ratio = tr M / tr G;
    rel_spectral = ||G - M||_2 / ||G||_2 (NaN where it was not asked for).
    """

    layer: str
    approximation: str
    fisher: str
    rel_frobenius: float = NAN
    rel_frobenius_stderr: float = NAN
    cosine: float = NAN
    cosine_stderr: float = NAN
    trace_ratio: float = NAN
    trace_ratio_stderr: float = NAN
    rel_spectral: float = NAN
    rel_spectral_stderr: float = NAN
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class SpectrumRow:
    """Derived numbers of one matrix's eigenvalues (`approximation` is also "ggn" for the block itself).

    condition = lambda_max / lambda_min_positive over the numerically nonzero eigenvalues; stable_rank =
    ||.||_F^2 / lambda_max^2; effective_rank = exp(entropy of the eigenvalues' shares of the trace).
    """

    layer: str
    approximation: str
    trace: float = NAN
    trace_stderr: float = NAN
    lambda_max: float = NAN
    lambda_max_stderr: float = NAN
    lambda_min_positive: float = NAN
    lambda_min_positive_stderr: float = NAN
    condition: float = NAN
    condition_stderr: float = NAN
    stable_rank: float = NAN
    stable_rank_stderr: float = NAN
    effective_rank: float = NAN
    effective_rank_stderr: float = NAN
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class StabilityRow:
    """One number that stability is judged by, of the network or of one layer.

    `low` and `high` are the spread over the batch and its halves, `threshold` what the number is compared with,
    `verdict` above, below, undecided or not_assessed: above only where `low` is above the threshold, below only where
    `high` is below it. A layer that is below says nothing of the network. `residual` is ||Mx - lambda x|| of an
    eigenvalue.
    """

    scope: str
    layer: str
    quantity: str
    value: float = NAN
    low: float = NAN
    high: float = NAN
    threshold: float = NAN
    verdict: str = "not_assessed"
    residual: float = NAN
    source: str = ""
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class SourceRow:
    """Why one K-FAC errs at one layer: `relative` = ||E|| / ||G||, E = G - M, and what it is made of.

    E is the sum of three matrices: curvature that depends on the inputs' deviation from their mean (`spread`), on where
    they lie along it (`mean`), and positions of one example adding up coherently (`cross`). The columns are their
    shares <T, E> / ||E||^2; they sum to 1 and may be negative (`measure.split`).
    """

    layer: str
    approximation: str
    relative: float = NAN
    spread: float = NAN
    mean: float = NAN
    cross: float = NAN
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class ExampleRow:
    """One of the examples that carry most of the top curvature, of a layer or ("") of the network.

    `curvature_share` is the example's part of u^T G u, u the top eigenvector (of the layer's block; for the network the
    direction that the stability verdict speaks of); `gradient_share` its part of the sum of squared gradient norms.
    """

    layer: str
    example: int
    curvature_share: float = NAN
    gradient_share: float = NAN
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class FindingRow:
    """One thing worth knowing: code, severity (info, warning, error), layer ("" = network), evidence, remedy.

    `title` says in a few words what the code stands for; `rank` counts from 1, the most important; `caused_by` is the
    code of the finding whose consequence this is, with its layer behind a blank, empty where it stands on its own.
    """

    code: str
    severity: str
    layer: str
    title: str = ""
    evidence: str
    remedy: str
    confidence: float = 1.0
    rank: int = 0
    caused_by: str = ""
    status: str = "ok"
    reason: str = ""


Row = LayerRow | CoverageRow | ErrorRow | SpectrumRow | StabilityRow | SourceRow | ExampleRow | FindingRow

TABLES: dict[str, type[Row]] = {
    "layers": LayerRow,
    "coverage": CoverageRow,
    "errors": ErrorRow,
    "spectra": SpectrumRow,
    "stability": StabilityRow,
    "sources": SourceRow,
    "examples": ExampleRow,
    "findings": FindingRow,
}


@dataclass(frozen=True)
class KroneckerFactors:
    """The two factors of one flavour, [d_in(+1), d_in(+1)] and [d_out, d_out], in the run's dtype.

    Scale and order are `CONVENTIONS[flavour]`; kron(B, A) is the approximation of the block.
    """

    flavour: str
    A: Array
    B: Array
    role: str = ""


@dataclass
class Layer:
    """One layer of a run.

    Attributes:
        row: its line in tables/layers.
        factors: "expand" and "reduce" to `KroneckerFactors`.
        spectrum: "ggn" and approximation names to float64 eigenvalues, descending, the nonzero part.
        errors: approximation name to its `ErrorRow`.
        spectra: "ggn" and approximation names to their `SpectrumRow`.
        eigenvectors: with dump="spectra": "ggn" to [P, rank], "expand/A", "expand/B", ... to square matrices.
        kept_columns: with dump="columns": [N*K, d_out, d_in(+1)].
        block: with dump="blocks": [P, P].
        attributes: raw extremes and solver facts, stored as attributes of the layer's group.
        sources: approximation name ("kfac_expand", "kfac_reduce") to its `SourceRow`.
        signs: its lines in tables/stability that need its columns or rows.
        examples: its lines in tables/examples.
        example_gradients: squared norms of the examples' parts of its gradient, [N], of a fresh analysis (not stored).
    """

    row: LayerRow
    factors: Mapping[str, KroneckerFactors] = field(default_factory=dict)
    spectrum: Mapping[str, Array] = field(default_factory=dict)
    errors: Mapping[str, ErrorRow] = field(default_factory=dict)
    spectra: Mapping[str, SpectrumRow] = field(default_factory=dict)
    eigenvectors: Mapping[str, Array] = field(default_factory=dict)
    kept_columns: Array | None = None
    block: Array | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, SourceRow] = field(default_factory=dict)
    signs: list[StabilityRow] = field(default_factory=list)
    examples: list[ExampleRow] = field(default_factory=list)
    example_gradients: Array | None = None

    @property
    def name(self) -> str:
        """The layer's name, the path of the module that owns its weight."""
        return self.row.name

    def columns(self) -> Array:
        """The GGN columns [N*K, d_out, d_in(+1)], `G = sum v v^T` over vec (row-major) of each.

        Raises:
            CurvscopeError: the run was made without dump="columns".
        """
        if self.kept_columns is None:
            from curvscope.errors import UsageError

            raise UsageError(
                "The columns of this layer were not kept.",
                where=f"layer {self.name}",
                remedy='Run again with dump="columns" (--dump columns).',
            )
        return self.kept_columns


@dataclass(frozen=True)
class RunInfo:
    """The attributes of the file's root: what was run, with what, and what was exact."""

    created: str
    curvscope_version: str
    torch_version: str
    backpack_version: str
    device: str
    dtype: str
    seed: int
    fisher: str
    samples: int
    complete: bool = True
    format: str = "curvscope-run"
    schema_version: str = SCHEMA_VERSION


@dataclass(frozen=True)
class ModelInfo:
    """The model, its loss and its batch in numbers.

    `loss` is L as trained, in eval mode; `gradient_norm` the 2-norm of its gradient over all trainable
    parameters; `coverage` the share of trainable parameters in layers with Kronecker factors; `mode_note` says
    what eval mode hides; `graph` is "exported" or "eager modules" (and why); `optimizer` is the optimizer with its
    numbers in one line, empty where none is known, and `learning_rate` the largest of its groups.
    """

    name: str
    checkpoint: str
    loss_name: str
    loss: float
    gradient_norm: float
    parameters: int
    coverage: float
    examples: int
    outputs: str
    graph: str = "exported"
    mode_note: str = ""
    step: int = -1
    optimizer: str = ""
    learning_rate: float = NAN


def row_values(row: Row) -> dict[str, Any]:
    """One row as a plain dict, in column order."""
    return {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}


@dataclass
class Run:
    """Everything one analysis found; what `analyze` returns and `open` reads back.

    Attributes:
        info: what was run, with what (the file's root attributes).
        model: model, loss, batch and coverage in numbers.
        config: the settings, as plain values.
        layers: name to `Layer`, in forward order.
        tables: name to rows, with the columns of `TABLES`.
        notes: sentences about how the input was read (stripped prefixes, casts, fallbacks).
        seconds: wall-clock seconds of each stage.
    """

    info: RunInfo
    model: ModelInfo
    config: dict[str, Any]
    layers: dict[str, Layer]
    tables: dict[str, list[Any]]
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def coverage(self) -> float:
        """The share of trainable parameters in layers that have Kronecker factors."""
        return self.model.coverage

    @property
    def findings(self) -> list[FindingRow]:
        """The findings, the most important first."""
        return list(self.tables.get("findings", []))
