"""Mixtures of experts: rows that a gate sends to experts, against every example on its own in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvscope

WIDTH, CLASSES = 4, 3
TOLERANCE = 1e-9


class Experts(nn.Module):
    """Tokens to the experts with the largest gates, expert by expert, as Mixtral's first implementation has it.

    `skip` leaves experts out that get no token, which torch.export refuses.
    """

    def __init__(self, skip: bool, experts: int = 4, most: int = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.up = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(3, WIDTH) for _ in range(experts))
        self.skip, self.most = skip, most

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        shares, chosen = torch.topk(self.gate(tokens).softmax(-1), self.most)
        out = torch.zeros_like(tokens)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            row, place = torch.where(chosen == number)
            if self.skip and len(row) == 0:
                continue
            out.index_add_(0, row, down(torch.relu(up(tokens[row]))) * shares[row, place, None])
        return out.view_as(x)


class Mixture(nn.Module):
    """Classes from the last token, which leaves rows of the experts without any gradient, or from all of them."""

    def __init__(self, skip: bool = False, last: bool = False) -> None:
        super().__init__()
        self.enter, self.experts, self.head = nn.Linear(5, WIDTH), Experts(skip), nn.Linear(WIDTH, CLASSES)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        h = torch.tanh(h + self.experts(h))
        return self.head(h[:, -1] if self.last else h.mean(1))


def made(examples: int = 5, tokens: int = 3, **options: Any) -> tuple[Mixture, Tensor, Tensor]:
    torch.manual_seed(1)
    model, x = Mixture(**options).double(), torch.randn(examples, tokens, 5).double()
    return model, x, torch.randint(CLASSES, (examples,))


def analyzed(model: nn.Module, data: Any, **options: Any) -> curvscope.Run:
    options = {"dtype": "float64", "fisher": "exact", "dump": "blocks"} | options
    return curvscope.analyze(model, data, loss="cross_entropy", **options)


def alone(model: Mixture, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]:
    """Layer -> exact block, and flavour -> (A, B), with one pass for every example and no other example in it."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inputs: dict[str, list[Tensor]] = {name: [] for name in linear}
    blocks: dict[str, Any] = dict.fromkeys(linear, 0)
    B: dict[str, dict[str, Any]] = {name: {"expand": 0, "reduce": 0} for name in linear}
    for one in x.split(1):
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in linear}
        handles = [
            module.register_forward_hook(
                lambda module, args, result, kept=seen[name]: kept.append((args[0].detach(), result))
            )
            for name, module in linear.items()
        ]
        logits = model(one).flatten()
        for handle in handles:
            handle.remove()
        p = logits.detach().softmax(0)
        H = (torch.diag(p) - torch.outer(p, p)) / len(x)
        for name, module in linear.items():
            if not seen[name]:
                continue
            a, result = seen[name][0]
            a = torch.cat([a.flatten(0, -2), a.new_ones(a[..., 0].numel(), 1)], 1) if module.bias is not None else a
            inputs[name].append(a.flatten(0, -2))
            rows = [torch.autograd.grad(v, result, retain_graph=True, materialize_grads=True)[0] for v in logits]
            g = torch.stack(rows).flatten(1, -2)
            J = torch.einsum("cro,ri->coi", g, a.flatten(0, -2)).flatten(1)
            blocks[name] = blocks[name] + J.T @ H @ J
            B[name]["expand"] = B[name]["expand"] + torch.einsum("cro,cd,drp->op", g, H, g)
            B[name]["reduce"] = B[name]["reduce"] + g.sum(1).T @ H @ g.sum(1)
    found = {}
    for name in linear:
        every = torch.cat(inputs[name])
        means = torch.stack([a.mean(0) for a in inputs[name] if len(a)])
        A = {"expand": every.T @ every / len(every), "reduce": means.T @ means / len(means)}
        found[name] = (blocks[name], {flavour: (A[flavour], B[name][flavour]) for flavour in A})
    return found


def gap(got: Any, expected: Tensor) -> float:
    return float((torch.as_tensor(got) - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


CASES: dict[str, dict[str, bool]] = {
    "every token": {},
    "the last token": {"last": True},
    "modules alone": {"skip": True, "last": True},
}


@pytest.mark.parametrize("case", CASES)
def test_experts_have_the_rows_of_their_examples(case: str) -> None:
    model, x, y = made(**CASES[case])
    run = analyzed(model, (x, y))
    assert run.model.graph.startswith("eager" if "skip" in CASES[case] else "exported")
    assert run.coverage == 1.0
    for name, (block, factors) in alone(model, x, y).items():
        layer = run.layers[name]
        assert gap(layer.block, block) < TOLERANCE, name
        for flavour, (A, B) in factors.items():
            assert gap(layer.factors[flavour].A, A) < TOLERANCE, (name, flavour)
            assert gap(layer.factors[flavour].B, B) < TOLERANCE, (name, flavour)


def test_experts_without_rows() -> None:
    model, x, y = made(examples=1, tokens=1)
    run = analyzed(model, (x, y))
    idle = [name for name, layer in run.layers.items() if layer.row.positions == 0]
    assert len(idle) == 4  # two of four experts, two layers each
    assert all(not run.layers[name].block.any() and run.layers[name].row.status == "ok" for name in idle)
    assert all(np.isfinite(layer.factors["expand"].A).all() for layer in run.layers.values())
    assert run.layers["experts.gate"].block.any()


def test_batches_route_each_its_own_rows() -> None:
    model, x, y = made()
    whole = analyzed(model, (x, y))
    parts = [(x[low:high], y[low:high]) for low, high in ((0, 2), (2, 3), (3, 5))]
    many = analyzed(model, parts)
    for name, layer in whole.layers.items():
        assert gap(many.layers[name].block, torch.as_tensor(layer.block)) < TOLERANCE, name
        for flavour, factors in layer.factors.items():
            assert gap(many.layers[name].factors[flavour].A, torch.as_tensor(factors.A)) < TOLERANCE, (name, flavour)
            assert gap(many.layers[name].factors[flavour].B, torch.as_tensor(factors.B)) < TOLERANCE, (name, flavour)


class Untold(nn.Module):
    """A trained layer whose rows are features of the whole batch, beside a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = nn.Linear(3, 1), nn.Linear(5, CLASSES)
        self.register_buffer("table", torch.arange(21.0).view(7, 3).sin())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.features(self.get_buffer("table").to(x) + 0 * x.sum()).sum()


def test_a_layer_whose_rows_nothing_tells_is_given_up_alone() -> None:
    torch.manual_seed(0)
    run = analyzed(Untold(), (torch.randn(4, 5).double(), torch.arange(4) % CLASSES))
    rows = {row.parameter: row for row in run.tables["coverage"]}
    assert rows["head.weight"].treatment == "kronecker"
    assert rows["features.weight"].treatment == "uncovered"
    assert "can't be assigned to examples" in rows["features.weight"].reason
