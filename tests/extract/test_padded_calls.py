"""Padding of layers that are called once a position: recurrent networks over sequences of unequal lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.run import Run
from tests.many import cut, worst

LENGTHS = torch.tensor([4, 2, 3, 1])


class Tagger(nn.Module):
    """A class for every step; what comes after a sequence's end has no target."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def batch(lengths: Tensor = LENGTHS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, targets = torch.randn(4, 4, 3, generator=generator), torch.randint(3, (4, 4), generator=generator)
    return x, targets.where(torch.arange(4) < lengths[:, None], -100)


def analyzed(given: Any) -> Run:
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": "float64", "fisher": "exact", "time": 1e-3}
    return curvscope.analyze(Tagger(), given, loss="cross_entropy:class_axis=last", **options)


@pytest.mark.parametrize("sizes", [[2, 2], [1, 3]])
def test_steps_behind_the_end_are_left_out_in_all_cuttings(sizes: list[int]) -> None:
    whole, pieces = analyzed(batch()), analyzed(cut(batch(), sizes))
    for name in ("rnn.weight_ih_l0", "rnn.weight_hh_l0", "head"):
        row = whole.layers[name].row
        assert (row.positions, row.padded) == (2.5, 1 - 10 / 16), name
    assert worst(whole, pieces) < 1e-9


def test_steps_that_no_sequence_has_are_a_selection() -> None:
    run = analyzed(batch(torch.full((4,), 3)))
    assert run.layers["rnn.weight_hh_l0"].row.padded == 0.0
