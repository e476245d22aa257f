"""What each column of each table means and in which unit, in words that stand next to the data."""

from __future__ import annotations

LAYER = "the layer's exact name"
STATUS = "ok, estimated, skipped, not_converged or not_assessed"
REASON = "why the status is not ok, or what limits the row; empty otherwise"
APPROXIMATION = "kfac_expand, kfac_reduce, ekfac_expand, ekfac_reduce, kron_best or diag"

MEANINGS: dict[str, dict[str, str]] = {
    "layers": {
        "name": "path of the module that owns the weight",
        "kind": "the linear operation: linear, conv1d, conv2d, conv3d, embedding, ...",
        "d_in": "inputs of the weight, without the bias",
        "d_out": "outputs of the weight",
        "bias": "whether a bias belongs to the layer (it is then the last input, a constant 1)",
        "groups": "groups of a grouped convolution, 1 otherwise",
        "parameters": "entries of weight and bias",
        "examples": "N, the examples of the batch",
        "positions": "mean number of real positions an example, R",
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
    "stability": {
        "scope": "network or layer (its block of the matrix)",
        "layer": "the layer's exact name, empty for the network",
        "quantity": "hessian_top, hessian_bottom, ggn_top (eigenvalues, loss / parameter^2); preconditioned_sharpness "
        "(top eigenvalue of P^-1 (H + wd), 1 / learning rate); growth_factor (a step, along the top direction); "
        "largest_stable_lr; direction_share (of the top direction's energy, 0 to 1); signs of trouble, turned so that "
        "large is bad: formulas and thresholds in docs/signs.md",
        "value": "the number on the whole batch",
        "low": "the smallest on the batch and its random halves; NaN where none were run",
        "high": "the largest on the batch and its random halves; NaN where none were run",
        "threshold": "what the value is compared with; for largest_stable_lr the learning rate in use",
        "verdict": "above (low is above the threshold), below (high is below it; a layer's says nothing of the "
        "network), undecided or not_assessed",
        "residual": "||M x - lambda x|| of the eigenvalue on the whole batch, same unit",
        "source": "the rule behind the threshold",
    },
    "sources": {
        "layer": LAYER,
        "approximation": "kfac_expand or kfac_reduce",
        "relative": "||E|| / ||G||, E = G - M the error, dimensionless",
        "spread": "share <T, E> / ||E||^2 of T = sum g g^T (x) at at^T - B (x) (A - m m^T), at = a - m: curvature "
        "depends on the inputs' deviation from their mean m; the three shares sum to 1 and may be negative",
        "mean": "share of T = sum g g^T (x) (m at^T + at m^T): curvature depends on where inputs lie along their mean",
        "cross": "share of T = G - sum g g^T (x) a a^T: positions of one example add up; for reduce g is the sum, a "
        "the mean over an example's positions",
    },
    "examples": {
        "layer": "the layer's exact name, empty for the network",
        "example": "place in the batch, from 0",
        "curvature_share": "of u^T G u, 0 to 1; u the top eigenvector of the layer's block; for the network the "
        "direction of the stability verdict",
        "gradient_share": "of the sum of the examples' squared gradient norms, 0 to 1",
    },
    "findings": {
        "code": "the rule's code",
        "severity": "info, warning or error",
        "layer": "the layer's exact name, empty for the network",
        "title": "what the code stands for",
        "rank": "order of importance, from 1",
        "caused_by": "code and layer of the finding that this one follows from, empty if none",
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
