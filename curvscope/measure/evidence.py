"""Laplace log evidence from the spectra of K-FAC and EKFAC, and the weight decay that it suggests.

With a Gaussian prior of precision tau on the parameters theta, P of them, and the curvature `scale M` of the training
set's negative log likelihood at theta (MacKay 1992; with Kronecker factors Immer et al., arXiv:2104.04975)

    log p(D) ~ -nll - tau ||theta||^2 / 2 + sum_i log(tau / (scale lambda_i + tau)) / 2 ,

lambda_i the eigenvalues of M. Its derivative in log tau is `(gamma - tau ||theta||^2) / 2` with the effective number of
parameters `gamma = sum scale lambda_i / (scale lambda_i + tau)`. gamma falls and tau ||theta||^2 rises with tau: there
is one maximum, found by bisection. `tau / scale` is the L2 weight decay with the same optimum (decay theta added to the
gradient of the loss as trained; AdamW's decoupled decay is something else).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvscope.graph.matrix import to_matrix
from curvscope.load.problem import Loss
from curvscope.measure.network import Vector
from curvscope.measure.parts import KRONECKER, LayerPart
from curvscope.measure.series import FACTORS
from curvscope.records import EvidenceRow

DECADES = range(-4, 5)
BISECTIONS = 200


@dataclass(frozen=True)
class Likelihood:
    """The training set's negative log likelihood: `nll = scale * L + constant`; `reason` why there is none.

    `assumed` says in words what had to be.
    """

    scale: float = math.nan
    nll: float = math.nan
    assumed: str = ""
    reason: str = ""


def likelihood(
    loss: Loss, value: float, terms: float, classes: bool, examples: int, dataset_size: int | None
) -> Likelihood:
    """The training set's negative log likelihood from the loss `value` on the examples at hand.

    Of a mean over terms (tokens, pixels, outputs) a training example has as many as these have on average. Squared
    errors are a Gaussian's with their own mean squared residual as variance.

    Args:
        loss: the loss as trained.
        value: L over all data.
        terms: how many terms of it count, see `curvscope.load.reduction.denominator`.
        classes: whether the targets are numbers of classes.
        examples: N.
        dataset_size: examples of the whole training set.
    """
    if dataset_size is None:
        return Likelihood(reason="the size of the training set is not known: --dataset-size")
    settings = loss.settings
    if loss.name == "callable":
        return Likelihood(reason="a callable loss may be no negative log likelihood")
    for key in ("weight", "pos_weight"):
        if settings.get(key) is not None:
            return Likelihood(reason=f"with {key} the loss is no negative log likelihood")
    if settings.get("label_smoothing"):
        return Likelihood(reason="with label smoothing the loss is no negative log likelihood")
    if loss.name in ("cross_entropy", "causal_lm") and not classes:
        return Likelihood(reason="class probabilities as targets are no observations")
    an_example = terms / examples
    mean = settings["reduction"] == "mean"
    scale = dataset_size * (an_example if mean else 1 / examples)
    assumed = ""
    if an_example != 1:
        assumed = f"{an_example:g} terms an example, as in the batch"
    if loss.name != "mse":
        return Likelihood(scale, scale * value, assumed)
    variance = value if mean else value / terms
    if variance <= 0:
        return Likelihood(reason="the residuals are zero, so their variance is not known")
    constant = dataset_size * an_example * 0.5 * math.log(2 * math.pi * variance)
    assumed = "; ".join(filter(None, (f"Gaussian noise of variance {variance:.4g}, the batch's residuals'", assumed)))
    scale = scale / (2 * variance)
    return Likelihood(scale, scale * value + constant, assumed)


@dataclass(frozen=True)
class LogEvidence:
    """The log evidence as a function of the precision; `curvatures` are the eigenvalues of scale M."""

    curvatures: Tensor
    squared_norm: float
    nll: float

    def at(self, precision: float) -> float:
        """The log evidence."""
        determinant = float(torch.log1p(self.curvatures / precision).sum())
        return -self.nll - 0.5 * precision * self.squared_norm - 0.5 * determinant

    def effective(self, precision: float) -> float:
        """Gamma, the effective number of parameters."""
        return float((self.curvatures / (self.curvatures + precision)).sum())

    def maximum(self) -> float | None:
        """The precision with the largest log evidence; None where it has none (no curvature, or theta = 0)."""
        if self.squared_norm <= 0 or float(self.curvatures.max()) <= 0:
            return None
        # gamma is at most P, and P is what tau ||theta||^2 is at the upper end
        high = math.log(self.curvatures.numel() / self.squared_norm)
        low = high - 1.0
        while self.effective(math.exp(low)) <= math.exp(low) * self.squared_norm:
            low -= high - low
        for _ in range(BISECTIONS):
            middle = 0.5 * (low + high)
            if middle in (low, high):
                break
            if self.effective(math.exp(middle)) > math.exp(middle) * self.squared_norm:
                low = middle
            else:
                high = middle
        return math.exp(0.5 * (low + high))


def evidence_rows(
    parts: Sequence[LayerPart], parameters: Vector, found: Likelihood, *, fisher: str
) -> list[EvidenceRow]:
    """Rows of tables/evidence: for each approximation the maximum and a decade grid around it."""
    rows: list[EvidenceRow] = []
    kept = [part for part in parts if part.inverses]
    for name in KRONECKER:
        reason = found.reason or ("" if kept else "no layer with Kronecker factors was measured")
        ekfac, flavour = name.startswith("ekfac"), name.rpartition("_")[2]
        inverses = [one for part in kept for one in part.inverses[flavour]]
        if not reason and ekfac and any(one.corrected is None for one in inverses):
            reason = "EKFAC's diagonal needs exact columns of every layer"
        if reason:
            rows.append(EvidenceRow(name, "maximum", status="not_assessed", reason=reason))
            continue
        curvatures = found.scale * torch.cat([one.eigenvalues(ekfac=ekfac).flatten() for one in inverses])
        squared = sum(float(to_matrix(part.spec, parameters).double().square().sum()) for part in kept)
        log_evidence = LogEvidence(curvatures, squared, found.nll)
        best = log_evidence.maximum()
        if best is None:
            reason = "no curvature, or parameters of zero: the evidence has no maximum"
            rows.append(EvidenceRow(name, "maximum", status="not_assessed", reason=reason))
            continue
        notes = [found.assumed, FACTORS.get(fisher, "")]
        for decade in DECADES:
            precision = best * 10.0**decade
            rows.append(
                EvidenceRow(
                    name,
                    "grid" if decade else "maximum",
                    precision=precision,
                    log_evidence=log_evidence.at(precision),
                    effective_parameters=log_evidence.effective(precision),
                    weight_decay=precision / found.scale,
                    nll=found.nll,
                    scale=found.scale,
                    parameters=sum(part.spec.parameters for part in kept),
                    status="estimated" if fisher in ("probe", "mc") else "ok",
                    reason="; ".join(filter(None, notes)),
                )
            )
    return rows
