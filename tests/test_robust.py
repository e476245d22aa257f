"""Inputs as people have them: each is analyzed, or refused with its real cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import curvscope
from curvscope.errors import BatchError, CheckpointError, LayoutError, LossError, ModelError


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


class Conditioned(nn.Module):
    """What `b` gets is one row for all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        return self.head(torch.tanh(self.a(x) + self.b(shared)))


@pytest.mark.parametrize("skip", [None, ["b"]])
def test_a_layer_of_an_input_without_examples_is_listed(skip: list[str] | None) -> None:
    torch.manual_seed(0)
    inputs, targets = pair()
    run = curvscope.analyze(Conditioned(), ((inputs, torch.randn(1, 3)), targets), loss="cross_entropy", skip=skip)
    assert list(run.layers) == ["a", "head"]
    treatment = {row.parameter: row.treatment for row in run.tables["coverage"]}
    assert treatment["b.weight"] == "uncovered"
    assert run.coverage < 1


class Last(nn.Module):
    """A network with something done to its outputs."""

    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = network()
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


@pytest.mark.parametrize(
    ("last", "words"),
    [
        pytest.param(lambda f: F.dropout(f, 0.5), "random: two passes", id="dropout"),
        pytest.param(lambda f: f + torch.randn_like(f), "random: two passes", id="noise"),
        pytest.param(lambda f: torch.complex(f, f), "got complex64", id="complex"),
        pytest.param(lambda f: f > 0, "got bool", id="bool"),
        pytest.param(lambda f: f.argmax(1), "got int64", id="classes"),
    ],
)
def test_outputs_that_no_loss_takes(last: Callable[[Tensor], Tensor], words: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match=words) as caught:
        curvscope.analyze(Last(last), pair(), loss="cross_entropy")
    assert caught.value.remedy


def test_a_model_may_draw_what_it_does_not_use() -> None:
    run = curvscope.analyze(Last(lambda f: f + 0 * torch.rand(())), pair(), loss="cross_entropy")
    assert run.layers


class Loop(nn.Module):
    """One example at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.inner(row) for row in x])


def test_a_loop_over_the_examples_is_told() -> None:
    with pytest.raises(LayoutError, match="once for each example") as caught:
        curvscope.analyze(Loop(), pair(), loss="cross_entropy")
    assert "layer inner.0" in caught.value.where
    assert "all examples at once" in caught.value.remedy


def test_inputs_whose_squares_overflow_are_named() -> None:
    inputs, targets = pair()
    with pytest.raises(BatchError, match=r"overflow in float32") as caught:
        curvscope.analyze(network(), (inputs * 1e20, targets), loss="cross_entropy")
    assert "input 0" in caught.value.where
    assert curvscope.analyze(network(), (inputs * 1e20, targets), loss="cross_entropy", dtype="float64").layers


def test_only_what_was_given_is_named() -> None:
    with pytest.raises(ModelError) as caught:
        curvscope.analyze(network(), pair(), loss="cross_entropy", skip=["*"])
    assert caught.value.where == "--skip *"


def test_a_dtype_of_torch_is_taken() -> None:
    assert curvscope.analyze(network(), pair(), loss="cross_entropy", dtype=torch.float64).info.dtype == "float64"


def test_lists_of_numbers_are_told() -> None:
    with pytest.raises(BatchError) as caught:
        curvscope.analyze(network(), ([[1.0, 2.0, 3.0, 4.0]] * 2, torch.tensor([0, 1])), loss="cross_entropy")
    assert "torch.tensor(list)" in caught.value.remedy


@pytest.mark.parametrize("loss", [nn.NLLLoss(), nn.NLLLoss, F.nll_loss])
def test_the_loss_of_log_probabilities_is_refused(loss: Any) -> None:
    with pytest.raises(LossError, match="log-probabilities") as caught:
        curvscope.analyze(network(), pair(), loss=loss)
    assert "cross_entropy" in caught.value.remedy


def test_one_byte_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    path.write_text("P")
    with pytest.raises(CheckpointError, match="no known format"):
        curvscope.analyze(path, pair(), loss="cross_entropy", factory=network)


def test_adafactor_is_told_by_its_name(tmp_path: Path) -> None:
    model, path = network(), tmp_path / "net.pt"
    optimizer = torch.optim.Adafactor(model.parameters())
    F.cross_entropy(model(pair()[0]), pair()[1]).backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    run = curvscope.analyze(path, pair(), loss="cross_entropy", factory=network)
    row = next(row for row in run.tables["stability"] if row.quantity == "preconditioned_sharpness")
    assert row.status == "not_assessed"
    assert "Adafactor" in row.reason
    assert not any("could not be matched" in note for note in run.notes)
