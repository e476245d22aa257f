"""Examples that reach each other in front of the first layer, where neither permutations nor gradients tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.errors import LayoutError
from tests.graph_cases import Messages, joined, rings


class Mixing(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.BatchNorm1d(4, affine=False, track_running_stats=False)
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.float() if x.dtype == torch.uint8 else x
        if self.kind == "batch_norm":
            x = self.norm(x)
        elif self.kind in ("centred", "uint8"):
            x = x - x.mean(0)
        elif self.kind == "ranked":
            x = torch.argsort(torch.argsort(x, 0), 0).to(self.first.weight)
        elif self.kind == "behind":  # nothing differentiable behind the last layer
            return self.head(torch.tanh(self.first(x))) + (x > x.mean(0)).to(x).sum(1, keepdim=True)
        return self.head(torch.tanh(self.first(x)))


@pytest.mark.parametrize("examples", [2, 7])
@pytest.mark.parametrize("kind", ["batch_norm", "centred", "uint8", "ranked", "behind"])
def test_mixing_is_refused(kind: str, examples: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(examples, 4)
    inputs = (inputs * 50).abs().to(torch.uint8) if kind == "uint8" else inputs
    with pytest.raises(LayoutError, match="mixes examples") as caught:
        curvscope.analyze(Mixing(kind), (inputs, torch.arange(examples) % 3), loss="cross_entropy")
    assert ("model's output" if kind == "behind" else "in front of layer first") in caught.value.where
    assert caught.value.remedy


class CentredNodes(Messages):
    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, edge_attr: Tensor) -> Tensor:
        return super().forward(x - x.mean(0), edge_index, batch, edge_attr)


def test_mixing_graphs_is_refused() -> None:
    torch.manual_seed(0)
    inputs, _ = joined(rings([3, 5, 2, 4, 6]), False)
    with pytest.raises(LayoutError, match="mixes graphs") as caught:
        curvscope.analyze(CentredNodes(), (inputs, torch.arange(5) % 3), loss="cross_entropy", example_index="batch")
    assert "in front of layer node" in caught.value.where
