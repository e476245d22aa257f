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
    "damping": {
        "layer": LAYER,
        "approximation": f"ggn (the block itself, whose step is the exact one), {APPROXIMATION}",
        "form": "how damping is added: eigenbasis, M + mu I; factored, (B + sqrt(mu)/pi I) (x) (A + pi sqrt(mu) I), "
        "pi = sqrt((tr A / d_A) / (tr B / d_B)); mu = damping + L2 weight decay of the optimizer",
        "damping": "the damping, in units of loss / parameter^2",
        "relative": "damping / (tr G / P), the mean of all P eigenvalues of the block; dimensionless",
        "mark": "current: the optimizer's own; recommended: the largest predicted_decrease; else empty",
        "angle_degrees": "angle between the step delta = -(damped M)^{-1} g and the exact -(G + mu I)^{-1} g, degrees; "
        "g is the layer's gradient, plus weight decay times the weights",
        "length_ratio": "length of delta over that of the exact step, dimensionless",
        "predicted_decrease": "-(g.delta + delta^T (G + decay I) delta / 2): what the exact quadratic model loses by "
        "the step, damping not part of the model; in units of the loss; negative where it grows",
        "decrease_share": "predicted_decrease over that of the exact step at the same damping, dimensionless; the "
        "exact step is shorter than it could be by its own damping, so that more than 1 is possible",
        "rho": "predicted_decrease over what M in place of G predicts for the same step, damping in neither; "
        "dimensionless",
        "effective_dimension": "tr M (damped M)^{-1}, eigenbasis: sum lambda / (lambda + mu): directions in which "
        "curvature rather than damping decides",
        "angle_to_gradient_degrees": "angle between delta and -g, degrees",
        "gradient_distance": "||mu delta + g|| / ||g||, dimensionless; near 0 delta is a step of gradient descent with "
        "rate 1 / mu",
        "alpha_star": "-g.delta / (delta^T (G + mu I) delta): the multiple of delta that is best for the exact damped "
        "model; below 1 the step is too long",
        "condition": "condition number of (M + mu)^{-1/2} (G + mu) (M + mu)^{-1/2} (factored: with the damped M); "
        "computed at the marked values only",
    },
    "ranges": {
        "layer": LAYER,
        "approximation": APPROXIMATION,
        "form": "how damping is added: eigenbasis or factored, as in the damping table",
        "current": "the optimizer's own damping, in units of loss / parameter^2; NaN if unknown",
        "low": "the safe range begins here: from here on rho >= 1/4; NaN: no such edge on the grid",
        "high": "the safe range ends here: up to here gradient_distance >= 1/10, beyond it the step is gradient "
        "descent; NaN: no such edge on the grid; low > high: there is no safe range",
        "recommended": "the damping with the largest decrease of the exact quadratic model",
        "decrease": "that decrease, in units of the loss",
        "gain": "1 - (decrease at the current damping) / decrease: 0, nothing to gain; 1, the current step gains "
        "nothing; more, it does harm",
        "noise_below": "the largest damping with effective_dimension >= 0.9 min(P, N K) and alpha_star < 1/4; "
        "NaN: none",
        "standing": "too_small (below low), safe, too_large (above high); empty if the current value is unknown",
        "form_gap": "1 - smaller / larger decrease of the two forms of a K-FAC at the current damping (unknown: at the "
        "one recommended for the eigenbasis form); more than 1: one of them does harm",
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
