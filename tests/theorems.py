"""Models for which K-FAC is exact by theorem, and their nearest neighbours for which it is not.

Eschenhagen et al. 2023 (arXiv:2311.00636) on deep linear networks in the expand and the reduce setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests import models
from tests.case_parts import Case, f64, labels, linear, linears, mlp_case
from tests.cases import CASES, log_cosh


@dataclass(frozen=True)
class Theorem:
    """K-FAC of `flavour` is the exact block on layers `exact`, and off by over `margin` on layers `off`."""

    case: Case
    flavour: str
    exact: tuple[str, ...] = ()
    off: tuple[str, ...] = ()
    margin: float = 5e-4


CHAIN = {"0": linear("0"), "1": linear("1"), "2": linear("2")}
POOLED = linears("body.0", "body.1", "head")
CONVS = linears("conv1", "conv2", "head")


def chain(loss: tuple[str, Mapping[str, Any]], examples: int = 4) -> Case:
    """Three linear layers on every token; every token has its own loss term."""

    def make() -> tuple[nn.Module, Tensor, Tensor]:
        model: nn.Module = models.linear_chain(3, 4, 3, 2)
        return model, f64(examples, 3, 3), f64(examples, 3, 2)

    return Case(make, loss, CHAIN)


def pooled(loss: tuple[str, Mapping[str, Any]], examples: int = 5, scale: float | None = None) -> Case:
    """Two linear layers on every token, the mean or a scaled sum over tokens, a linear head."""

    def make() -> tuple[nn.Module, Tensor, Tensor]:
        model = models.Pooled(models.linear_chain(3, 4, 3), nn.Linear(3, 2), scale)
        targets = f64(examples, 2) if loss[0] == "mse" else labels(2, examples)
        return model, 10 * f64(examples, 4, 3), targets

    return Case(make, loss, POOLED)


def linear_cnn(loss: tuple[str, Mapping[str, Any]], examples: int = 4, **settings: Any) -> Case:
    def make() -> tuple[nn.Module, Tensor, Tensor]:
        targets = f64(examples, 2) if loss[0] == "mse" else labels(2, examples)
        return models.PooledCNN(**settings), f64(examples, 2, 5, 5), targets

    return Case(make, loss, CONVS)


class Mixing(nn.Module):
    """A linear chain whose tokens are averaged with their predecessors on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return self.after(h.cumsum(1) / torch.arange(1, x.shape[1] + 1).to(h)[:, None])


MSE: tuple[str, dict[str, Any]] = ("mse", {})
MSE_SUM: tuple[str, dict[str, Any]] = ("mse", {"reduction": "sum"})
CE: tuple[str, dict[str, Any]] = ("cross_entropy", {})
CIRCULAR: dict[str, Any] = {"padding": 1, "padding_mode": "circular"}

THEOREMS: dict[str, Theorem] = {
    # One example, one position: both flavours, any loss.
    "one_example_ce_expand": Theorem(CASES["one_example"], "expand", ("0", "2", "4")),
    "one_example_ce_reduce": Theorem(CASES["one_example"], "reduce", ("0", "2", "4")),
    "one_example_callable": Theorem(mlp_case(log_cosh, lambda: f64(1, 3), examples=1), "expand", ("0", "2", "4")),
    "two_examples_ce": Theorem(
        mlp_case(("cross_entropy", {}), lambda: labels(3, 2), examples=2), "expand", off=("0", "2", "4")
    ),
    # Deep linear, every token its own loss term, no mixing: expand.
    "linear_tokens_mse": Theorem(chain(MSE), "expand", ("0", "1", "2")),
    "linear_tokens_mse_sum": Theorem(chain(MSE_SUM), "expand", ("0", "1", "2")),
    "linear_tokens_mse_reduce": Theorem(chain(MSE), "reduce", off=("0", "1", "2")),
    "linear_tokens_mixing": Theorem(
        Case(lambda: (Mixing(), f64(4, 3, 3), f64(4, 3, 2)), MSE, linears("before", "after")),
        "expand",
        ("after",),
        ("before",),
    ),
    # Deep linear, outputs a mean or scaled sum over tokens: reduce.
    "linear_pooled_mse": Theorem(pooled(MSE), "reduce", ("body.0", "body.1", "head")),
    "linear_pooled_mse_sum": Theorem(pooled(MSE_SUM), "reduce", ("body.0", "body.1", "head")),
    "linear_pooled_scaled_sum": Theorem(pooled(MSE, scale=0.7), "reduce", ("body.0", "body.1", "head")),
    "linear_pooled_expand": Theorem(pooled(MSE), "expand", ("head",), ("body.0", "body.1")),
    "linear_pooled_ce": Theorem(pooled(CE), "reduce", off=("body.0", "body.1", "head")),
    # One example, linear layers, mean pooling: reduce, with cross-entropy too.
    "one_pooled_example_ce": Theorem(pooled(CE, examples=1), "reduce", ("body.0", "body.1", "head")),
    "one_pooled_example_expand": Theorem(pooled(CE, examples=1), "expand", ("head",), ("body.0", "body.1")),
    # Linear CNN with global average pooling: reduce where the padding keeps all positions alike.
    "linear_cnn_circular": Theorem(linear_cnn(MSE, **CIRCULAR), "reduce", ("conv1", "conv2", "head")),
    "linear_cnn_zeros": Theorem(linear_cnn(MSE, padding=1), "reduce", ("conv2", "head"), ("conv1",), 0.05),
    "linear_cnn_unpadded": Theorem(linear_cnn(MSE), "reduce", ("conv2", "head"), ("conv1",), 0.05),
    "linear_cnn_circular_one_ce": Theorem(linear_cnn(CE, examples=1, **CIRCULAR), "reduce", ("conv1", "conv2", "head")),
}
