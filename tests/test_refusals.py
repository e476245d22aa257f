"""What the analysis refuses: every error says what, where and what to do, and has the exit code of bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.errors import BatchError, CurvscopeError, DeviceError, LossError, ModelError, UsageError
from tests import models


class Overflows(nn.Module):
    """Finite weights, finite batch, Inf behind the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.exp(self.second(self.first(x).abs() + 1) * 1e3 + 1e3))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return models.mlp(4, 5, 3)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 4), torch.randint(3, (6,))


def not_a_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    """Convex, positive semidefinite, and still no sum over examples."""
    return outputs.mean() ** 2


def not_convex(outputs: Tensor, targets: Tensor) -> Tensor:
    return -(outputs**2).sum()


def nan_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs * float("nan")).sum()


def detached(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.detach().sum()


CASES: dict[str, tuple[type[CurvscopeError], Callable[[], Any], str]] = {
    "overflow_names_the_layer": (
        ModelError,
        lambda: curvscope.analyze(Overflows(), batch(), loss="cross_entropy"),
        "layer head",
    ),
    "wrong_width": (
        BatchError,
        lambda: curvscope.analyze(mlp(), (torch.randn(6, 7), torch.randint(3, (6,))), loss="cross_entropy"),
        "float32 [6, 7]",
    ),
    "wrong_dtype": (
        BatchError,
        lambda: curvscope.analyze(mlp(), (torch.ones(6, 4, dtype=torch.long), batch()[1]), loss="cross_entropy"),
        "int64 [6, 4]",
    ),
    "unknown_keyword": (
        BatchError,
        lambda: curvscope.analyze(mlp(), ({"pixels": batch()[0]}, batch()[1]), loss="cross_entropy"),
        "pixels",
    ),
    "empty_batch": (
        BatchError,
        lambda: curvscope.analyze(mlp(), (torch.zeros(0, 4), torch.zeros(0).long()), loss="cross_entropy"),
        "",
    ),
    "target_out_of_range": (
        BatchError,
        lambda: curvscope.analyze(mlp(), (batch()[0], torch.full((6,), 3)), loss="cross_entropy"),
        "",
    ),
    "not_scalar": (
        LossError,
        lambda: curvscope.analyze(mlp(), batch(), loss=lambda f, y: f.sum(1)),
        "",
    ),
    "not_a_sum": (LossError, lambda: curvscope.analyze(mlp(), batch(), loss=not_a_sum), "not_a_sum"),
    "not_convex": (LossError, lambda: curvscope.analyze(mlp(), batch(), loss=not_convex), "not_convex"),
    "nan_loss": (LossError, lambda: curvscope.analyze(mlp(), batch(), loss=nan_loss), "nan_loss"),
    "detached_loss": (LossError, lambda: curvscope.analyze(mlp(), batch(), loss=detached), "detached"),
    "linear_loss": (LossError, lambda: curvscope.analyze(mlp(), batch(), loss=lambda f, y: f.sum()), ""),
    "mc_of_a_callable": (
        UsageError,
        lambda: curvscope.analyze(mlp(), batch(), loss=lambda f, y: (f**2).sum(), fisher="mc"),
        "",
    ),
    "unknown_axis": (
        BatchError,
        lambda: curvscope.analyze(mlp(), batch(), loss="cross_entropy", example_axes={"0": 5}),
        "",
    ),
    "unknown_axis_name": (
        BatchError,
        lambda: curvscope.analyze(mlp(), batch(), loss="cross_entropy", example_axes={"pixels": 0}),
        "",
    ),
    "no_output_tensor": (
        ModelError,
        lambda: curvscope.analyze(NoTensor(), batch(), loss="cross_entropy"),
        "",
    ),
    "unknown_fisher": (
        UsageError,
        lambda: curvscope.analyze(mlp(), batch(), loss="cross_entropy", fisher="full"),
        "--fisher",
    ),
    "unknown_memory": (
        UsageError,
        lambda: curvscope.analyze(mlp(), batch(), loss="cross_entropy", memory="lots"),
        "--memory",
    ),
}


class NoTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> str:
        self.inner(x)
        return "done"


@pytest.mark.parametrize("name", CASES)
def test_refusal(name: str) -> None:
    kind, run, where = CASES[name]
    with pytest.raises(kind) as caught:
        run()
    error = caught.value
    assert error.exit_code == (2 if kind is UsageError else 3)
    assert error.what.strip()
    assert error.remedy.strip()
    assert where in error.where, error.where


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent() -> None:
    with pytest.raises(DeviceError, match="no CUDA device") as caught:
        curvscope.analyze(mlp(), batch(), loss="cross_entropy", device="cuda")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_callable_losses_that_pass_the_checks(dtype: str) -> None:
    """A callable that computes cross-entropy gives what the named loss gives."""
    options: dict[str, Any] = {"dtype": dtype, "fisher": "exact"}
    named = curvscope.analyze(mlp(), batch(), loss="cross_entropy", **options)
    called = curvscope.analyze(mlp(), batch(), loss=lambda f, y: nn.functional.cross_entropy(f, y), **options)
    for name, layer in named.layers.items():
        for approximation, row in layer.errors.items():
            if approximation.startswith("kfac"):
                got = called.layers[name].errors[approximation].rel_frobenius
                assert got == pytest.approx(row.rel_frobenius, rel=1e-5 if dtype == "float32" else 1e-9)
