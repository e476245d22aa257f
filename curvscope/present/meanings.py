"""What each column of each table means and in which unit, in words that stand next to the data."""

from __future__ import annotations

LAYER = "the layer's exact name"
STATUS = "ok, estimated, skipped, not_converged or not_assessed"
REASON = "why the status is not ok, or what limits the row; empty otherwise"
APPROXIMATION = "kfac_expand, kfac_reduce, ekfac_expand, ekfac_reduce, kron_best or diag"

MEANINGS: dict[str, dict[str, str]] = {
    "layers": {
        "name": "path of the module that owns the weight",
        "kind": "the linear operation: linear, conv1d, conv2d, conv3d, embedding, ...; of a weight used in several "
        "roles their names, as in embedding+head",
        "d_in": "inputs of the weight, without the bias",
        "d_out": "outputs of the weight",
        "bias": "whether a bias belongs to the layer (it is then the last input, a constant 1)",
        "groups": "groups of a grouped convolution, 1 otherwise",
        "parameters": "entries of weight and bias",
        "examples": "N, the examples of the batch",
        "positions": "mean number of real positions an example, R, those of all roles together",
        "columns": "number of GGN columns, N times K",
        "better_flavour": "expand or reduce: the K-FAC with the smaller relative Frobenius error; same where they "
        "agree; else neither",
        "padded": "share of rows found to be padding and left out, 0 to 1",
    },
    "coverage": {
        "parameter": "path of the parameter",
        "layer": "the layer it belongs to, empty if none",
        "count": "entries of the parameter",
        "treatment": "kronecker, exact_only, frozen or uncovered",
    },
    "errors": {
        "layer": LAYER,
        "approximation": APPROXIMATION,
        "fisher": "how the loss Hessian's root was taken: exact, probe, mc or empirical",
        "rel_frobenius": "||G - M||_F / ||G||_F, dimensionless; 0 is exact, 1 is as far off as M = 0",
        "cosine": "<G, M> / (||G||_F ||M||_F), dimensionless",
        "trace_ratio": "tr M / tr G, dimensionless",
        "rel_spectral": "||G - M||_2 / ||G||_2, dimensionless; NaN where it was not asked for",
    },
    "spectra": {
        "layer": LAYER,
        "approximation": f"ggn (the block itself), {APPROXIMATION}",
        "trace": "sum of the eigenvalues, in units of loss / parameter^2",
        "lambda_max": "largest eigenvalue, in units of loss / parameter^2",
        "lambda_min_positive": "smallest numerically nonzero eigenvalue, in units of loss / parameter^2",
        "condition": "lambda_max / lambda_min_positive, dimensionless",
        "stable_rank": "||.||_F^2 / lambda_max^2, dimensionless",
        "effective_rank": "exp of the entropy of the eigenvalues' shares of the trace, dimensionless",
    },
    "findings": {
        "code": "the rule's code",
        "severity": "info, warning or error",
        "layer": "the layer's exact name, empty for the network",
        "evidence": "the numbers that led to it, in words",
        "remedy": "what to do about it",
        "confidence": "0 to 1",
    },
}


def meaning(table: str, column: str) -> str:
    """The meaning and unit of one column; empty for a column that is not known here."""
    if column == "status":
        return STATUS
    if column == "reason":
        return REASON
    known = MEANINGS.get(table, {})
    if column not in known and column.endswith("_stderr"):
        return f"standard error of {column.removesuffix('_stderr')}, same unit; NaN where that is exact"
    return known.get(column, "")
