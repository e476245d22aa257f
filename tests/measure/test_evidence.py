"""Log evidence against a dense Laplace approximation in float64, its maximum, and the scale of the likelihood."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.load.loss import named_loss
from curvscope.load.reduction import denominator
from curvscope.measure.evidence import LogEvidence, likelihood
from curvscope.records import EvidenceRow
from tests import models
from tests.measure.test_network import dense
from tests.whole import places

SIZE = 1000
NAMES = ("kfac_expand", "kfac_reduce", "ekfac_expand", "ekfac_reduce")


def analyzed(loss: Any = "cross_entropy", **settings: Any) -> tuple[nn.Module, Tensor, Tensor, curvscope.Run]:
    torch.manual_seed(0)
    model, x, y = models.ResidualCNN().double().eval(), torch.randn(3, 2, 8, 8).double(), torch.randint(3, (3,))
    given = {"dtype": "float64", "fisher": "exact", "dataset_size": SIZE, **settings}
    return model, x, y, curvscope.analyze(model, (x, y), loss=loss, **given)


def rows_of(run: curvscope.Run, name: str) -> list[EvidenceRow]:
    return [row for row in run.tables["evidence"] if row.approximation == name]


@pytest.mark.parametrize("name", NAMES)
def test_evidence_is_the_dense_laplace_approximations(name: str) -> None:
    model, x, y, run = analyzed()
    _, _, G, _, _ = dense(model, x, y, "cross_entropy")
    shapes = {key: p.shape for key, p in model.named_parameters()}
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    blocks, kept = [], []
    for layer, place in places(run, shapes).items():
        if not run.layers[layer].factors:
            continue
        pair = run.layers[layer].factors[name.rpartition("_")[2]]
        A, B = torch.as_tensor(pair.A), torch.as_tensor(pair.B)
        M = torch.kron(B, A)
        if name.startswith("ekfac"):
            where = place.flatten()
            U = torch.kron(torch.linalg.eigh(B)[1], torch.linalg.eigh(A)[1])
            M = U @ torch.diag((U.T @ G[where][:, where] @ U).diagonal()) @ U.T
        blocks.append(M)
        kept.append(theta[place.flatten()])
    M, theta = torch.block_diag(*blocks), torch.cat(kept)
    P = len(theta)
    nll = SIZE * float(nn.functional.cross_entropy(model(x), y).detach())
    rows = rows_of(run, name)
    assert len(rows) == 9
    for row in rows:
        H = SIZE * M + row.precision * torch.eye(P, dtype=torch.float64)
        prior = -0.5 * row.precision * float(theta.square().sum()) + 0.5 * P * math.log(row.precision / (2 * math.pi))
        want = -nll + prior + 0.5 * P * math.log(2 * math.pi) - 0.5 * float(torch.linalg.slogdet(H)[1])
        assert row.log_evidence == pytest.approx(want, rel=1e-8)
        gamma = float((SIZE * M @ torch.linalg.inv(H)).trace())
        assert row.effective_parameters == pytest.approx(gamma, rel=1e-8)
        assert row.weight_decay == pytest.approx(row.precision / SIZE, rel=1e-12)
        assert row.parameters == P
    best = next(row for row in rows if row.role == "maximum")
    assert best.log_evidence == max(row.log_evidence for row in rows)
    assert best.effective_parameters == pytest.approx(best.precision * float(theta.square().sum()), rel=1e-9)


def test_the_maximum_is_where_no_neighbour_is_higher() -> None:
    curvatures = torch.logspace(-8, 4, 50, dtype=torch.float64)
    found = LogEvidence(curvatures, 7.0, 3.0)
    best = found.maximum()
    assert best is not None
    assert all(found.at(best) >= found.at(best * factor) for factor in (0.5, 0.99, 1.01, 2.0))


@pytest.mark.parametrize(("curvatures", "norm"), [(torch.zeros(4), 1.0), (torch.ones(4), 0.0)])
def test_no_curvature_or_no_parameters_have_no_maximum(curvatures: Tensor, norm: float) -> None:
    assert LogEvidence(curvatures.double(), norm, 0.0).maximum() is None


def test_without_the_size_of_the_training_set_nothing_is_assessed() -> None:
    run = analyzed(dataset_size=None)[3]
    assert {row.status for row in run.tables["evidence"]} == {"not_assessed"}
    assert all("--dataset-size" in row.reason for row in run.tables["evidence"])


def test_evidence_does_not_need_the_steps() -> None:
    run = analyzed(time=1e-6)[3]
    assert {row.status for row in run.tables["steps"]} == {"not_assessed"}
    assert {row.status for row in run.tables["evidence"]} == {"ok"}


def test_draws_leave_ekfac_out() -> None:
    run = analyzed(fisher="probe", samples=4)[3]
    assert {row.status for row in rows_of(run, "kfac_expand")} == {"estimated"}
    assert [row.status for row in rows_of(run, "ekfac_reduce")] == ["not_assessed"]


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("cross_entropy", {"label_smoothing": 0.1}, "label smoothing"),
        ("cross_entropy", {"weight": [1.0, 2.0, 3.0]}, "weight"),
        ("bce_with_logits", {"pos_weight": [2.0]}, "pos_weight"),
    ],
)
def test_losses_that_are_no_likelihood_are_told(name: str, settings: dict[str, Any], reason: str) -> None:
    found = likelihood(named_loss(name, settings), 1.0, 4, True, 4, SIZE)
    assert reason in found.reason


def nll_of(name: str, outputs: Tensor, targets: Tensor, variance: float) -> float:
    """The batch's negative log likelihood, term by term, from torch's distributions."""
    if name == "cross_entropy":
        return -float(torch.distributions.Categorical(logits=outputs).log_prob(targets).sum())
    if name == "bce_with_logits":
        return -float(torch.distributions.Bernoulli(logits=outputs).log_prob(targets).sum())
    return -float(torch.distributions.Normal(outputs, variance**0.5).log_prob(targets).sum())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["cross_entropy", "bce_with_logits", "mse"])
def test_the_scale_makes_the_loss_the_training_sets_likelihood(name: str, reduction: str) -> None:
    torch.manual_seed(1)
    loss = named_loss(name, {"reduction": reduction})
    outputs = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    targets: Tensor = torch.randint(4, (6,)) if name == "cross_entropy" else torch.rand(6, 4).round().double()
    variance = float((outputs - targets).detach().square().mean()) if name == "mse" else 1.0
    value = loss(outputs, targets)
    found = likelihood(loss, float(value.detach()), denominator(loss, outputs, targets), True, 6, SIZE)
    assert found.nll == pytest.approx(SIZE / 6 * nll_of(name, outputs.detach(), targets, variance), rel=1e-12)
    # the curvature in the outputs, too: the second derivative of scale * L is that of the likelihood
    (first,) = torch.autograd.grad(value, outputs)
    moved = outputs.detach().clone()
    moved[0, 0] += 1e-3
    change = nll_of(name, moved, targets, variance) - nll_of(name, outputs.detach(), targets, variance)
    assert found.scale * float(first[0, 0]) * 1e-3 == pytest.approx(SIZE / 6 * change, rel=2e-2, abs=1e-6)


def test_ignored_tokens_are_no_terms() -> None:
    torch.manual_seed(1)
    loss = named_loss("causal_lm", {})
    outputs, tokens = torch.randn(2, 5, 7).double(), torch.randint(7, (2, 5))
    tokens[0, 3:] = -100
    value = float(loss(outputs, tokens))
    found = likelihood(loss, value, denominator(loss, outputs, tokens), True, 2, SIZE)
    assert found.scale == SIZE * 6 / 2
    assert "3 terms an example" in found.assumed


def test_residuals_of_zero_have_no_variance() -> None:
    found = likelihood(named_loss("mse", {}), 0.0, 4, False, 2, SIZE)
    assert "residuals are zero" in found.reason
