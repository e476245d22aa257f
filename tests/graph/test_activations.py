"""What one pass shows of attention and units, against the same numbers taken from the model's own modules."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvscope.graph.activations import Activations, Observer
from tests.networks import graph_and_network


def seen(model: nn.Module, inputs: Any) -> Activations | None:
    model = model.double().eval()
    with torch.no_grad():
        targets = torch.randn_like(model(inputs))
    graph, _ = graph_and_network(model, inputs, targets, "mse")
    whole, pieces = Observer(graph), Observer(graph)
    whole.add([inputs])
    for piece in inputs.split([2, inputs.shape[0] - 2]):
        pieces.add([piece])
    assert_close(whole.seen(), pieces.seen())
    return whole.seen()


def approx(value: float) -> Any:
    return pytest.approx(value, rel=1e-12, nan_ok=True)


def assert_close(one: Activations | None, other: Activations | None) -> None:
    """Seen at once or piece by piece, the numbers are the same."""
    if one is None or other is None:
        assert one is other
        return
    for left, right in zip((*one.attention, *one.units), (*other.attention, *other.units), strict=True):
        expected = dataclasses.asdict(right)
        numbers = {name: value for name, value in expected.items() if isinstance(value, float)}
        assert dataclasses.asdict(left) == {**expected, **{name: approx(value) for name, value in numbers.items()}}


class OwnAttention(nn.Module):
    """Attention written out: products, a softmax, a mask of -inf; or torch's fused function."""

    def __init__(self, fused: bool, scale: float = 1.0, causal: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.fused, self.scale, self.causal = fused, scale, causal
        self.logits = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.scale * self.q(x), self.k(x)
        if self.fused:
            q, k, v = (part.unsqueeze(1) for part in (q, k, x))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal).squeeze(1)
        else:
            logits = q @ k.transpose(1, 2) / 2
            if self.causal:
                hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
                logits = logits.masked_fill(hidden, -math.inf)
            mixed = torch.softmax(logits, -1) @ x
        return self.out(mixed).mean(1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_attention(fused: bool, causal: bool, scale: float) -> None:
    torch.manual_seed(0)
    model, x = OwnAttention(fused, scale, causal).double(), torch.randn(3, 5, 4, dtype=torch.float64)
    found = seen(model, x)
    assert found is not None
    (attention,) = found.attention
    with torch.no_grad():
        logits = scale * model.q(x) @ model.k(x).transpose(1, 2) / 2
    largest, entropies = 0.0, []
    for n in range(3):
        for t in range(5):
            allowed = logits[n, t, : t + 1] if causal else logits[n, t]
            largest = max(largest, float(allowed.abs().max()))
            if len(allowed) > 1:
                p = torch.softmax(allowed, 0)
                entropies.append(float(torch.special.entr(p).sum()) / math.log(len(allowed)))
    assert attention.layer == "q"
    assert attention.logit == pytest.approx(largest, rel=1e-10)
    assert attention.entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-10)


def test_packed_attention_is_named_by_its_projection() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    found = seen(nn.Sequential(layer), torch.randn(3, 5, 8, dtype=torch.float64))
    assert found is not None
    assert [attention.layer for attention in found.attention] == ["0.self_attn"]
    assert 0.5 < found.attention[0].entropy <= 1.0


def test_a_classifiers_softmax_is_no_attention() -> None:
    found = seen(nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)), torch.randn(3, 4, dtype=torch.float64))
    assert found is not None and found.attention == ()


@pytest.mark.parametrize(("unit", "kind"), [(nn.Tanh(), "tanh"), (nn.Sigmoid(), "sigmoid")])
def test_saturated_units(unit: nn.Module, kind: str) -> None:
    model = nn.Sequential(nn.Linear(2, 4), unit, nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([0.0, 20.0, -20.0, 0.1]))
    found = seen(model, torch.randn(6, 2, dtype=torch.float64))
    assert found is not None
    (units,) = found.units
    assert (units.layer, units.kind, units.saturated, units.dead) == ("0", kind, 0.5, 0.5)


@pytest.mark.parametrize("convolution", [True, False])
def test_dead_units(convolution: bool) -> None:
    first: Any = nn.Conv2d(1, 3, 3) if convolution else nn.Linear(4, 3)
    rest = [nn.Flatten(), nn.Linear(12, 2)] if convolution else [nn.Linear(3, 2)]
    model = nn.Sequential(first, nn.ReLU(), *rest).double()
    with torch.no_grad():
        first.bias.copy_(torch.tensor([50.0, -50.0, 0.0]))
    found = seen(model, torch.randn(9, *((1, 4, 4) if convolution else (4,)), dtype=torch.float64))
    assert found is not None
    (units,) = found.units
    assert (units.layer, units.kind) == ("0", "relu")
    assert units.dead == pytest.approx(1 / 3)
    assert math.isnan(units.saturated)


def test_eager_modules_show_nothing() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.head(x)) if float(x.sum()) > -1e9 else x

    assert seen(Branching(), torch.randn(5, 4, dtype=torch.float64)) is None
