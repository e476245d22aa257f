"""The rows that describe layers: what they are, how far their approximations are off, and why."""

from __future__ import annotations

from dataclasses import dataclass

NAN = float("nan")


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
