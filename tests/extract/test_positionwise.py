"""One backward pass for all positions, where they do not mix: the same numbers as one pass a position."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.run import Run
from tests import models

T, C = 7, 4


class Embedded(nn.Module):
    """Position table, norm, a layer that is called twice, and a residual, all token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(T, 4))
        self.norm = nn.LayerNorm(4)
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x + self.table)
        return self.head(h + torch.tanh(self.twice(torch.tanh(self.twice(h)))))


class Flat(nn.Module):
    """Tokens of all examples on one axis, examples fastest, and class scores [N, C, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 5, bias=False)
        self.head = nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        N = x.shape[0]
        h = torch.tanh(self.inner(x.transpose(0, 1).reshape(T * N, 3)))
        return self.head(h).view(T, N, C).permute(1, 2, 0)


class Parts(nn.Module):
    """Two slices of one weight and of its bias, and a scale that is clamped before any token comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.scale = nn.Linear(3, 8), nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        left, right = zip(self.packed.weight.chunk(2), self.packed.bias.chunk(2), strict=True)
        gate = torch.sigmoid(nn.functional.linear(x, *left))
        return self.head(gate * torch.tanh(nn.functional.linear(x.cos(), *right)) * self.scale.clamp(max=0.5).exp())


def segmentation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, C, 1))


def labels(*shape: int) -> Tensor:
    """Class indices; the last positions of the first example, and all of the second, do not count."""
    found = torch.randint(C, shape)
    found[0].flatten()[-2:] = -100
    found[1] = -100
    return found


# model, inputs, targets, loss
CASES: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor, str]]] = {
    "mlp": lambda: (models.mlp(3, 5, C), torch.randn(4, T, 3), labels(4, T), "cross_entropy:class_axis=last"),
    "segmentation": lambda: (segmentation(), torch.randn(3, 3, 3, 3), labels(3, 3, 3), "cross_entropy"),
    # the first layer's rows are patches, and each reaches one pixel only
    "patches": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, C, 1)),
        torch.randn(2, 2, 3, 3),
        torch.randint(C, (2, 3, 3)),
        "cross_entropy",
    ),
    "norm and table": lambda: (
        Embedded(),
        torch.randn(3, T, 4),
        torch.randint(C, (3, T)),
        "cross_entropy:class_axis=last",
    ),
    "parts": lambda: (Parts(), torch.randn(3, T, 3), torch.randint(C, (3, T)), "cross_entropy:class_axis=last"),
    "flat": lambda: (Flat(), torch.randn(3, T, 3), labels(3, T), "cross_entropy:class_axis=second"),
    "causal_lm": lambda: (models.mlp(3, 5, C), torch.randn(4, T, 3), torch.randint(C, (4, T)), "causal_lm"),
    "mse": lambda: (Embedded(), torch.randn(3, T, 4), torch.randn(3, T, C), "mse"),
    "bce, channels first": lambda: (segmentation(), torch.randn(3, 3, 3, 3), torch.rand(3, C, 3, 3), "bce_with_logits"),
}


def analyzed(name: str, **options: Any) -> Run:
    torch.manual_seed(0)
    model, inputs, targets, loss = CASES[name]()
    return curvscope.analyze(model, (inputs, targets), loss=loss, dtype="float64", fisher="exact", **options)


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_as_one_pass_a_position(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    got = analyzed(name, dump=("blocks",))
    assert any("one backward pass serves all" in note for note in got.notes)
    monkeypatch.setattr("curvscope.extract.ready.independent_positions", lambda *_: None)
    want = analyzed(name, dump=("blocks",))
    assert not any("one backward pass" in note for note in want.notes)
    assert list(got.layers) == list(want.layers)
    assert got.model.gradient_norm == pytest.approx(want.model.gradient_norm, rel=1e-12)
    for layer, other in want.layers.items():
        mine = got.layers[layer]
        np.testing.assert_allclose(mine.block, other.block, rtol=1e-10, atol=1e-13 * np.abs(other.block).max())
        for key in ("examples", "positions", "padded", "better_flavour"):
            assert getattr(mine.row, key) == getattr(other.row, key)
        for flavour, pair in other.factors.items():
            for factor in "AB":
                expected = getattr(pair, factor)
                close = {"rtol": 1e-10, "atol": 1e-13 * np.abs(expected).max()}
                np.testing.assert_allclose(getattr(mine.factors[flavour], factor), expected, **close)
        for approximation, row in other.errors.items():
            if "not unique" in row.reason:
                continue  # EKFAC's basis is arbitrary there
            close = {"rel": 1e-8, "abs": 1e-9, "nan_ok": True}
            assert mine.errors[approximation].rel_frobenius == pytest.approx(row.rel_frobenius, **close)
        assert mine.spectra["ggn"].trace == pytest.approx(other.spectra["ggn"].trace, rel=1e-11)


@pytest.mark.parametrize("name", ["mlp", "norm and table"])
def test_kept_columns_have_the_block(name: str) -> None:
    run = analyzed(name, dump=("columns", "blocks"))
    for layer in run.layers.values():
        V = layer.columns().reshape(layer.row.columns, -1)
        np.testing.assert_allclose(V.T @ V, layer.block, rtol=1e-10, atol=1e-15)


class Between(nn.Module):
    """Two layers, token by token, and something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.last = nn.Linear(4, C)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.tanh(self.first(x))))


def two_far_positions(h: Tensor) -> Tensor:
    return torch.cat([h[:, :1] + 1e-6 * h[:, -1:], h[:, 1:]], dim=1)


def norm_over_tokens(h: Tensor) -> Tensor:
    return h / (1 + h.square().mean(1, keepdim=True)).sqrt()


def reordered(h: Tensor) -> Tensor:
    return h.flip(1)


@pytest.mark.parametrize("between", [two_far_positions, norm_over_tokens, reordered])
def test_models_that_mix_positions_are_found_out(between: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Between(between)
    batch = (torch.randn(3, 16, 3), torch.randint(C, (3, 16)))
    options: dict[str, Any] = {"loss": "cross_entropy:class_axis=last", "dtype": "float64", "fisher": "exact"}
    mixing = curvscope.analyze(model, batch, **options)
    assert not any("one backward pass" in note for note in mixing.notes)
    assert mixing.layers["first"].row.columns == 3 * 16 * (C - 1)
    plain = curvscope.analyze(Between(torch.tanh), batch, **options)
    assert any("3 passes instead of 48" in note for note in plain.notes)


@pytest.mark.parametrize("fisher", ["probe", "mc", "empirical"])
def test_draws_are_not_shared(fisher: str) -> None:
    torch.manual_seed(0)
    model, inputs, targets, loss = CASES["mlp"]()
    run = curvscope.analyze(model, (inputs, targets), loss=loss, fisher=fisher)
    assert not any("one backward pass" in note for note in run.notes)


def test_convolutions_over_several_pixels_mix_those_of_layers_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.Conv2d(3, C, 3, padding=1))
    run = curvscope.analyze(model, (torch.randn(2, 2, 5, 5), torch.randint(C, (2, 5, 5))), loss="cross_entropy")
    assert not any("one backward pass" in note for note in run.notes)
