"""The user's model, batch and random state are bit-identical after an analysis."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope
from tests import models


class WritesInForward(nn.Module):
    """Counts its calls in a buffer, keeps a plain tensor attribute, and freezes a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 3)
        self.first.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.shift = torch.full((5,), 0.1)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.drop(self.norm(self.first(x)) + self.shift))


class OldWeightNorm(nn.Module):
    """A weight that is a non-leaf tensor attribute, as the old weight_norm leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.ones(5, 1))
        self.cached = self.scale * 2
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)) * self.scale.T)


class Branching(WritesInForward):
    """Data-dependent control flow: export refuses it and the eager fallback runs."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) > -1e9 else self.head(self.first(x))


CASES: dict[str, Any] = {
    "mixed": WritesInForward,
    "old_weight_norm": OldWeightNorm,
    "eager": Branching,
    "residual": models.ResidualCNN,
    "root": lambda: nn.Linear(4, 3),
}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that has to stay: values, addresses, modes, flags, hooks, gradients."""
    tensors = {**dict(model.named_parameters()), **{f"buffer {n}": b for n, b in model.named_buffers()}}
    facts: dict[str, Any] = {
        name: (t.detach().clone(), t.data_ptr(), t.requires_grad, t.grad) for name, t in tensors.items()
    }
    for name, module in model.named_modules():
        hooks = [len(getattr(module, key)) for key in vars(module) if key.endswith("_hooks")]
        facts[f"module {name}"] = (module.training, hooks, sorted(vars(module)), type(module))
    return facts


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and torch.equal(left, right)
    if isinstance(left, (tuple, list)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_of_the_users_changes(name: str, dtype: str) -> None:
    torch.manual_seed(3)
    model = CASES[name]().train()
    shape = (6, 2, 8, 8) if name == "residual" else (6, 4)
    inputs, targets = torch.randn(shape), torch.randint(3, (6,))
    before, batch = fingerprint(model), (inputs.clone(), targets.clone())
    state = torch.get_rng_state().clone()
    grad_mode, fast_path = torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()

    run = curvscope.analyze(
        model, (inputs, targets), loss="cross_entropy", dtype=dtype, fisher="exact", measure="steps", dataset_size=60
    )

    assert len(run.layers) >= 1
    assert {row.status for row in run.tables["steps"]} <= {"ok", "not_assessed"}
    assert "ok" in {row.status for row in run.tables["steps"]}
    after = fingerprint(model)
    assert before.keys() == after.keys()
    for key, fact in before.items():
        assert same(fact, after[key]), key
    assert torch.equal(inputs, batch[0])
    assert torch.equal(targets, batch[1])
    assert torch.equal(state, torch.get_rng_state())
    assert (grad_mode, fast_path) == (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled())


def test_the_model_still_trains_afterwards() -> None:
    torch.manual_seed(0)
    model = WritesInForward().train()
    twin = copy.deepcopy(model)
    inputs, targets = torch.randn(6, 4), torch.randint(3, (6,))
    curvscope.analyze(model, (inputs, targets), loss="cross_entropy")
    for each in (model, twin):
        torch.manual_seed(1)
        nn.functional.cross_entropy(each(inputs), targets).backward()
    for (name, left), right in zip(model.named_parameters(), twin.parameters(), strict=True):
        if left.requires_grad:
            assert left.grad is not None, name
            assert torch.equal(left.grad, right.grad), name


def test_eval_mode_and_frozen_parameters_are_told() -> None:
    run = curvscope.analyze(
        WritesInForward().train(), (torch.randn(6, 4), torch.randint(3, (6,))), loss="cross_entropy"
    )
    assert "BatchNorm" in run.model.mode_note
    assert "dropout" in run.model.mode_note
    treatment = {row.parameter: row.treatment for row in run.tables["coverage"]}
    assert treatment["first.bias"] == "frozen"
    assert treatment["first.weight"] == "kronecker"
    assert treatment["norm.weight"] == "exact_only"
    assert not run.layers["first"].row.bias
