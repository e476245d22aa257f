"""Casts of the forward pass itself: computed in the run's dtype like everything else, or refused with the cause."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import curvscope
from curvscope.errors import BatchError, ModelError
from curvscope.graph.widening import Widened


class Casting(nn.Module):
    """Two layers with a cast in front of the second one."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.how = nn.Linear(5, 6), nn.Linear(6, 3), how

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.how == "weights":
            return F.linear(h.half(), self.second.weight.half(), self.second.bias.to(torch.float16)).float()
        if self.how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.second(h).float()
        casts = {"half": h.half, "double": h.double, "float": h.float, "bfloat16": h.bfloat16}
        h = casts[self.how]() if self.how in casts else h
        return self.second(h)


@pytest.mark.parametrize("how", ["half", "weights", "autocast"])
def test_narrow_casts_are_computed_in_the_runs_dtype(how: str) -> None:
    batch = torch.randn(8, 5), torch.arange(8) % 3
    model, plain = Casting(how), Casting()
    if how == "half":  # as such a checkpoint is: else torch itself refuses the pass
        model, plain = model.to(torch.bfloat16), plain.to(torch.bfloat16)
    dtype = "float32" if how == "autocast" else "float64"  # which autocast leaves alone
    run, expected = (
        curvscope.analyze(m, batch, loss="cross_entropy", fisher="exact", dtype=dtype) for m in (model, plain)
    )
    assert run.coverage == 1
    for name, layer in expected.layers.items():
        found, rtol = layer.spectrum["ggn"], {"float32": 1e-5, "float64": 1e-12}[dtype]
        torch.testing.assert_close(run.layers[name].spectrum["ggn"], found, rtol=0, atol=rtol * found[0])
    assert any("forward pass casts to" in note for note in run.notes)


def test_every_way_to_cast_is_widened() -> None:
    x = torch.ones(2)
    with Widened(torch.float64):
        found = [x.half(), x.bfloat16(), x.float(), x.to(torch.float16), x.to(dtype=torch.bfloat16), x.type(torch.half)]
        found += [torch.zeros(2, dtype=torch.half), x.to("cpu", torch.float32), x.double()]
    assert {each.dtype for each in found} == {torch.float64}
    assert x.half().dtype == torch.float16


def test_two_dtypes_that_remain_are_told_with_their_place() -> None:
    with pytest.raises(BatchError) as caught:
        curvscope.analyze(Casting("double"), (torch.randn(8, 5), torch.arange(8) % 3), loss="cross_entropy")
    assert "Double and Float" in caught.value.what
    assert "module second (Linear)" in caught.value.where
    assert "test_casts.py, line" in caught.value.where
    assert "weight.dtype" in caught.value.remedy


def test_a_model_that_casts_to_double_runs_in_float64_as_the_remedy_says() -> None:
    batch = torch.randn(8, 5), torch.arange(8) % 3
    with pytest.raises(BatchError) as caught:
        curvscope.analyze(Casting("double").double(), batch, loss="cross_entropy")
    assert '--dtype float64 (in Python dtype="float64")' in caught.value.remedy
    run = curvscope.analyze(Casting("double").double(), batch, loss="cross_entropy", dtype="float64")
    assert not any("casts" in note for note in run.notes)


@pytest.mark.parametrize(
    ("stored", "how", "named"),
    [
        (torch.float32, "float", ""),
        (torch.bfloat16, "float", ""),
        (torch.bfloat16, "bfloat16", ""),
        (torch.float64, "float", "float32"),
        (torch.float32, "weights", "float16"),
        (torch.bfloat16, "half", "float16"),
    ],
)
def test_only_casts_that_round_what_is_stored_are_noted(stored: torch.dtype, how: str, named: str) -> None:
    batch = torch.randn(8, 5), torch.arange(8) % 3
    run = curvscope.analyze(Casting(how).to(stored), batch, loss="cross_entropy", dtype="float64")
    noted = [note for note in run.notes if "forward pass casts" in note]
    assert len(noted) == bool(named)
    assert not named or f"casts to {named};" in noted[0]


class Branching(nn.Module):
    """Casts to half, and goes where the data says, which torch.export refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.half() if float(x.sum()) > 0 else -x.half())


def test_casts_without_a_graph_are_refused_with_the_cause() -> None:
    with pytest.raises(ModelError) as caught:
        curvscope.analyze(Branching().half(), (torch.randn(8, 5), torch.arange(8) % 3), loss="cross_entropy")
    assert "casts to another floating type than float32" in caught.value.what
    assert "module layer (Linear)" in caught.value.where
