"""Inputs as people have them: each is analyzed, or refused with its real cause."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import curvscope


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def pair(examples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(examples, 4, generator=generator), torch.randint(3, (examples,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("many", [False, True], ids=["one batch", "two batches"])
def test_classes_of_any_integer_type(dtype: torch.dtype, many: bool) -> None:
    inputs, targets = pair()
    small = targets.to(dtype)
    batch = [(inputs[:2], small[:2]), (inputs[2:], small[2:])] if many else (inputs, small)
    run = curvscope.analyze(network(), batch, loss="cross_entropy")
    same = curvscope.analyze(network(), (inputs, targets), loss="cross_entropy")
    for name, layer in same.layers.items():
        assert run.layers[name].spectrum["ggn"] == pytest.approx(layer.spectrum["ggn"], rel=1e-4)
