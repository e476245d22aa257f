"""A run and its layers, in numpy and plain Python.

Conventions (vec order, where 1/N sits) are those of `CONVENTIONS`; nothing else states them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from curvscope.records.damping import DampingRow, RangeRow
from curvscope.records.layers import NAN, ErrorRow, LayerRow, SourceRow, SpectrumRow
from curvscope.records.verdicts import ExampleRow, FindingRow, StabilityRow

Array = npt.NDArray[Any]


SCHEMA_VERSION = "1.0"


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
    """The attributes of the file's root: what was run, with what, and what was exact.

    `dtype` is the arithmetic; `source_dtype` names the dtypes that the weights are stored in where those are others
    ("bfloat16", or "bfloat16, float32" where they are mixed), and is empty where they are not.
    """

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
    source_dtype: str = ""


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
