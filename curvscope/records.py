"""What a run is, in numpy and plain Python: reading one back needs no torch.

Conventions (vec order, where 1/N sits) are those of `CONVENTIONS`; nothing else states them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
    "embedding": "a layer with one-hot inputs, d_in = vocabulary, d_out = width of a row; A of expand is diagonal and "
    "stored as the vector [d_in] of the tokens' shares of the positions; all rows of the weight that the batch does "
    "not look up have zero curvature, so A of reduce, the columns and the block run over `tokens` [U] alone, those "
    "that occur, ascending, and the layer's damped steps are those of these tokens; positions with the padding token "
    "(padding_idx) do not count, and it has no place in tokens",
    "roles": "a weight used in several roles (embedding and head, or plain and transposed) has factors for each role, "
    "in the role's own orientation; the columns and the block are of all uses together, in the orientation "
    "[d_out, d_in] of the first role, over all of d_in; kfac_<flavour> is the sum over roles of kron(B, A), or of "
    "kron(A, B) for a role that uses the transpose",
}


@dataclass(frozen=True)
class LayerRow:
    """One layer: a weight, with the bias that belongs to it.

    `positions` is the mean number of real positions an example (R_n), those of all roles together, `padded` the share
    of rows that were found to be padding and left out, `columns` the number of GGN columns (N times K). `kind` names
    the roles of a weight used in several, as in embedding+head.
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
class DampingRow:
    """One damped step of one layer: what the optimizer would do with this approximation and this damping.

    With g the layer's gradient (plus weight decay times the weights, where the optimizer adds it), mu = damping +
    weight decay, delta = -(M + mu I)^{-1} g (form eigenbasis; factored: -((B + sqrt(mu)/pi I) (x) (A + pi sqrt(mu)
    I))^{-1} g) and exact = -(G + mu I)^{-1} g: angle and length ratio of delta and exact; predicted_decrease =
    -(g.delta + delta^T (G + decay) delta / 2), damping left out of the model; decrease_share = that over exact's; rho =
    that over what M in place of G predicts; effective_dimension = tr M (M + mu)^{-1}; gradient_distance = ||mu delta +
    g|| / ||g||; alpha_star = -g.delta / (delta^T (G + mu) delta); condition = that of (M + mu)^{-1/2} (G + mu) (M +
    mu)^{-1/2}, at the marked values only. `relative` is damping / (tr G / P); `mark` says current (the optimizer's
    own), recommended, or nothing.
    """

    layer: str
    approximation: str
    form: str
    damping: float = NAN
    relative: float = NAN
    mark: str = ""
    angle_degrees: float = NAN
    length_ratio: float = NAN
    predicted_decrease: float = NAN
    decrease_share: float = NAN
    rho: float = NAN
    effective_dimension: float = NAN
    angle_to_gradient_degrees: float = NAN
    gradient_distance: float = NAN
    alpha_star: float = NAN
    condition: float = NAN
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class RangeRow:
    """Which damping one layer's approximation can take.

    From `low` on the Levenberg-Marquardt ratio rho stays at 1/4 or more; up to `high` gradient_distance is 1/10 or
    more: the step still differs from plain gradient descent. NaN: as far as the grid goes. `recommended` has the
    largest decrease of the exact quadratic model, `decrease`; `gain` = 1 - (decrease at `current`) / `decrease`.
    Below `noise_below` noise is amplified: effective_dimension >= 0.9 min(P, N K) and alpha_star < 1/4. `standing` is
    where the current value is: too_small, safe, too_large, or empty. `form_gap` = 1 - smaller / larger decrease of the
    forms eigenbasis and factored, at the current value (unknown: at the one recommended for the eigenbasis).
    """

    layer: str
    approximation: str
    form: str
    current: float = NAN
    low: float = NAN
    high: float = NAN
    recommended: float = NAN
    decrease: float = NAN
    gain: float = NAN
    noise_below: float = NAN
    standing: str = ""
    form_gap: float = NAN
    joint: float = NAN
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class StepRow:
    """One damped step of the whole network, delta = -(M + damping I)^{-1} (grad L + w theta), w the L2 decay.

    predicted_change = R . delta + delta^T (G + w) delta / 2 with the exact GGN of the whole network; actual_change by a
    forward pass; rho = actual_change / predicted_change; length factors are multiples of the step, `alpha_star` =
    -R . delta / delta^T (G + w) delta the one at which the model is lowest. `role` is grid, current (the optimizer's
    own damping), recommended (as in `GlobalDampingRow`), lowest, or boundary (tried to find where the safe range
    begins); relative_damping is damping over the mean eigenvalue of G, with a standard error where that is estimated.
    """

    approximation: str
    form: str
    damping: float
    role: str
    relative_damping: float = NAN
    relative_damping_stderr: float = NAN
    predicted_change: float = NAN
    actual_change: float = NAN
    rho: float = NAN
    step_norm: float = NAN
    angle_to_gradient_degrees: float = NAN
    alpha_star: float = NAN
    best_step_length: float = NAN
    best_length_change: float = NAN
    model_length: float = NAN
    passes: int = 0
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class GlobalDampingRow:
    """What the steps of one approximation and form say of damping: one value for all layers, or one for each.

    Changes are those of the objective by one step. `damping`, the recommended one, has the lowest objective of all
    tried, safe or not. Every damping judged from `safe_from` on has rho >= 1/4 and a predicted decrease (the
    Levenberg-Marquardt rule); safe_*: that of them with the lowest objective. From
    `lowerable_from` on rho > 3/4; from `gradient_from` on the step points within 18 degrees of the negative gradient.
    per_layer_*: every layer at the damping that its own block recommends (`RangeRow.recommended`), all times
    `per_layer_factor`, chosen by the same rule. current_*: at the optimizer's own damping.
    """

    approximation: str
    form: str
    damping: float = NAN
    relative_damping: float = NAN
    relative_damping_stderr: float = NAN
    change: float = NAN
    predicted_change: float = NAN
    rho: float = NAN
    safe_from: float = NAN
    safe_damping: float = NAN
    safe_change: float = NAN
    safe_rho: float = NAN
    lowerable_from: float = NAN
    gradient_from: float = NAN
    per_layer_predicted: float = NAN
    per_layer_change: float = NAN
    per_layer_rho: float = NAN
    per_layer_factor: float = NAN
    current: float = NAN
    current_change: float = NAN
    current_rho: float = NAN
    current_alpha_star: float = NAN
    passes: int = 0
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class EvidenceRow:
    """The Laplace log evidence of the training set at one precision of a Gaussian prior on the Kronecker layers.

    log_evidence = -nll - precision ||theta||^2 / 2 + sum log(precision / (scale lambda + precision)) / 2 over the P
    eigenvalues lambda of M; effective_parameters = sum scale lambda / (scale lambda + precision); weight_decay =
    precision / scale, the L2 decay (not AdamW's) with the same optimum. `role` is grid or maximum.
    """

    approximation: str
    role: str
    precision: float = NAN
    log_evidence: float = NAN
    effective_parameters: float = NAN
    weight_decay: float = NAN
    nll: float = NAN
    scale: float = NAN
    parameters: int = 0
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


@dataclass(frozen=True)
class KroneckerFactors:
    """The two factors of one flavour, [d_in(+1), d_in(+1)] and [d_out, d_out], in the run's dtype.

    Scale and order are `CONVENTIONS[flavour]`; kron(B, A) is the approximation of the block. With groups both have a
    leading axis of groups. An embedding's A is [d_in], a diagonal, for expand and [U, U] over `Layer.tokens` for reduce
    (`CONVENTIONS["embedding"]`). `role` is empty but for a weight used in several (`CONVENTIONS["roles"]`).
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
        factors: "expand" and "reduce" to `KroneckerFactors`; for a weight used in several roles "expand/embedding",
            "expand/head", "reduce/embedding", ...: flavour and role (embedding, head, linear or transposed).
        spectrum: "ggn" and approximation names to float64 eigenvalues, descending, the nonzero part.
        errors: approximation name to its `ErrorRow`.
        spectra: "ggn" and approximation names to their `SpectrumRow`.
        eigenvectors: with dump="spectra": "ggn" to [P, rank], "expand/A", "expand/B", ... to square matrices.
        kept_columns: with dump="columns": [N*K, d_out, d_in(+1)]; of an embedding [N*K, d_out, U].
        block: with dump="blocks": [P, P]; of an embedding [d_out U, d_out U].
        tokens: of an embedding: the U inputs that occur in the batch, ascending, over which A of reduce runs, and in a
            layer of one role also the columns, the block and its eigenvectors; else None.
        attributes: raw extremes and solver facts, stored as attributes of the layer's group.
        sources: approximation name ("kfac_expand", "kfac_reduce") to its `SourceRow`.
        signs: its lines in tables/stability that need its columns or rows.
        examples: its lines in tables/examples.
        example_gradients: squared norms of the examples' parts of its gradient, [N], of a fresh analysis (not stored).
        damping: its lines in tables/damping.
        ranges: its lines in tables/ranges.
    """

    row: LayerRow
    factors: Mapping[str, KroneckerFactors] = field(default_factory=dict)
    spectrum: Mapping[str, Array] = field(default_factory=dict)
    errors: Mapping[str, ErrorRow] = field(default_factory=dict)
    spectra: Mapping[str, SpectrumRow] = field(default_factory=dict)
    eigenvectors: Mapping[str, Array] = field(default_factory=dict)
    kept_columns: Array | None = None
    block: Array | None = None
    tokens: Array | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, SourceRow] = field(default_factory=dict)
    signs: list[StabilityRow] = field(default_factory=list)
    examples: list[ExampleRow] = field(default_factory=list)
    example_gradients: Array | None = None
    damping: Sequence[DampingRow] = ()
    ranges: Sequence[RangeRow] = ()

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
