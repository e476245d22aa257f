"""What each column of each table means and in which unit, in words that stand next to the data."""

from __future__ import annotations

LAYER = "the layer's exact name"
STATUS = "ok, estimated, skipped, not_converged or not_assessed"
REASON = "why the status is not ok, or what limits the row; empty otherwise"
WHOLE = "kfac_expand, kfac_reduce, ekfac_expand, ekfac_reduce, or ggn (the exact block of every layer)"
FORM = "eigenbasis (M + lam I) or factored (lam split between the factors, arXiv:1503.05671 section 6.3)"
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
        "better_flavour": "expand or reduce: the K-FAC with the smaller relative Frobenius error; undecided where the "
        "error bar of the difference reaches 0; same where they "
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
        "recommended": "the damping with the largest decrease of the layer's own exact quadratic model: the best if "
        "only this layer moves",
        "decrease": "that decrease, in units of the loss",
        "gain": "1 - (decrease at the current damping) / decrease: 0, nothing to gain; 1, the current step gains "
        "nothing; more, it does harm",
        "noise_below": "the largest damping with effective_dimension >= 0.9 min(P, N K) and alpha_star < 1/4; "
        "NaN: none",
        "standing": "too_small (below low), safe, too_large (above high), for a step of this layer alone; empty if the "
        "current value is unknown",
        "form_gap": "1 - smaller / larger decrease of the two forms of a K-FAC at the current damping (unknown: at the "
        "one recommended for the eigenbasis form); more than 1: one of them does harm",
        "joint": "the damping to set where all layers step together by this approximation: recommended times "
        "per_layer_factor of the table global_damping; NaN where that was not tried, is not safe or does no better "
        "than one value for all: the reason says which",
    },
    "steps": {
        "approximation": WHOLE,
        "form": FORM,
        "damping": "lam, added to every layer's approximation, in units of loss / parameter^2",
        "role": "grid, current (the optimizer's own damping), recommended, safest (lowest objective of the safe), "
        "or boundary (tried to find where the safe range begins)",
        "relative_damping": "damping over the mean eigenvalue of the network's exact GGN, tr G / P: from the layers' "
        "exact traces, else (with a standard error) from 4 probes",
        "predicted_change": "change of the objective by the quadratic model with the exact GGN of the whole network, "
        "without damping * ||step||^2 / 2, in units of the loss",
        "actual_change": "change of the objective at theta + step, in units of the loss; with the L2 decay's term "
        "where the optimizer has one",
        "rho": "actual_change / predicted_change, dimensionless",
        "step_norm": "2-norm of the step over all parameters that it moves",
        "angle_to_gradient_degrees": "angle between the step and the negative gradient, 0 to 180",
        "alpha_star": "multiple of the step at which the quadratic model is lowest; below 1 the step is too long",
        "best_step_length": "multiple of the step with the lowest objective, of those tried; NaN without line search",
        "best_length_change": "actual change there, in units of the loss",
        "model_length": "multiple of the step from which the actual change is off by more than 25 % of the largest "
        "change predicted up to there",
        "passes": "forward and backward passes that the row took",
    },
    "global_damping": {
        "approximation": WHOLE,
        "form": FORM,
        "damping": "the recommended damping: the lowest objective after one step, of all tried, safe or not; below "
        "safe_from it is not, and the reason says so",
        "relative_damping": "the same over the mean eigenvalue of the network's exact GGN",
        "change": "actual change of the objective there, in units of the loss",
        "predicted_change": "change by the quadratic model there, in units of the loss",
        "rho": "change / predicted_change, dimensionless",
        "safe_from": "least damping tried from which on rho >= 1/4 and a decrease is predicted",
        "safe_damping": "the damping with the lowest objective after one step, of those from safe_from on",
        "safe_change": "actual change of the objective there, in units of the loss",
        "safe_rho": "rho there, dimensionless",
        "lowerable_from": "least damping tried from which on rho > 3/4: it may be lowered there",
        "gradient_from": "least damping tried from which on the step is within 18 degrees of the negative gradient",
        "per_layer_predicted": "change by the model with each layer at the damping that its own exact block "
        "recommends, times per_layer_factor (column joint of the table ranges), in units of the loss",
        "per_layer_change": "the same, actual",
        "per_layer_rho": "per_layer_change / per_layer_predicted, dimensionless",
        "per_layer_factor": "the common factor on those dampings with the lowest objective, of those tried from which "
        "on rho >= 1/4 and a decrease is predicted",
        "per_layer_gain": "per_layer_change / change - 1: how much more than by one value for all; 0 or less: the "
        "column joint of the table ranges is withheld",
        "current": "the optimizer's own damping; NaN where the checkpoint has none",
        "current_change": "actual change of the objective by the whole step there, in units of the loss",
        "current_rho": "rho there, dimensionless",
        "current_alpha_star": "multiple of that step at which the quadratic model is lowest",
        "passes": "forward and backward passes for this approximation and form in all",
    },
    "evidence": {
        "approximation": WHOLE,
        "role": "grid or maximum",
        "precision": "of the Gaussian prior on the parameters with Kronecker factors, 1 / parameter^2",
        "log_evidence": "Laplace log evidence of the training set, in nats",
        "effective_parameters": "sum of scale * lambda / (scale * lambda + precision) over the eigenvalues lambda",
        "weight_decay": "precision / scale: the L2 decay with the same optimum, not AdamW's decoupled one",
        "nll": "negative log likelihood of the training set, the batch's loss scaled up, in nats",
        "scale": "what the loss is multiplied with to be the training set's negative log likelihood (but for a "
        "constant)",
        "parameters": "P, the entries of the parameters with Kronecker factors",
    },
    "stability": {
        "scope": "network or layer (its block of the matrix)",
        "layer": "the layer's exact name, empty for the network",
        "quantity": "hessian_top, hessian_bottom, ggn_top (eigenvalues, loss / parameter^2); preconditioned_sharpness "
        "(top eigenvalue of P^-1 (H + wd), 1 / learning rate); growth_factor (a step, along the top direction); "
        "largest_stable_lr; clip_scale (the factor that clipping by norm puts on the gradient), clipped_sharpness, "
        "clipped_growth, clipped_stable_lr (the same where it acts); scheduled_peak_lr (the rate at the step ahead "
        "where the scheduler leaves the lowest threshold); direction_share (of the top direction's energy, 0 to 1); "
        "signs of trouble, turned so that large is bad: formulas and thresholds in docs/signs.md",
        "value": "the number on the whole batch",
        "low": "the smallest on the batch and its random halves; of a number from draws the lower end of its 95 % "
        "interval; NaN where neither is known",
        "high": "the largest on the batch and its random halves, or the upper end of that interval",
        "threshold": "what the value is compared with; for largest_stable_lr the learning rate in use, for "
        "scheduled_peak_lr the largest stable one",
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
