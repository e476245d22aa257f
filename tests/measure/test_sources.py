"""tables/sources against the definition, from naive rows and dense matrices in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import curvscope
from tests import models
from tests.measure.test_layer_signs import Positionwise, parameters_of
from tests.reference import output_hessian
from tests.rows import call, layer_io

N = 5


class Attending(nn.Module):
    """One attention, its mean over positions, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = models.PlainAttention(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x).mean(1))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...], bool]] = {
    "formed": (lambda: models.mlp(4, 2, 3), (N, 4), (N,), False),
    "outer": (lambda: models.mlp(9, 8, 3), (N, 9), (N,), False),
    "attention": (Attending, (N, 5, 4), (N,), False),
    "shared": (models.SharedTwice, (N, 4), (N,), False),
    "padded": (models.MaskedPool, (N, 4, 3), (N,), False),
    "positions apart": (Positionwise, (N, 4, 4), (N, 4), True),
}


def terms(a: Tensor, g: Tensor, G: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Spread, mean and cross of the rows a [N, R, i] and g [N, K, R, o] that are real [N, R], one at a time."""
    A, m = a[real].T @ a[real] / real.sum(), a[real].mean(0)
    B = torch.einsum("nkro,nkrp->op", g, g)
    mean, spread, diagonal = (torch.zeros_like(G) for _ in range(3))
    for n in range(a.shape[0]):
        for r in real[n].nonzero().flatten().tolist():
            gg, at = g[n, :, r].T @ g[n, :, r], a[n, r] - m
            spread += torch.kron(gg, torch.outer(at, at))
            mean += torch.kron(gg, torch.outer(m, at) + torch.outer(at, m))
            diagonal += torch.kron(gg, torch.outer(a[n, r], a[n, r]))
    E = G - torch.kron(B, A)
    found = {"spread": spread - torch.kron(B, A - torch.outer(m, m)), "mean": mean, "cross": G - diagonal}
    torch.testing.assert_close(sum(found.values()), E, rtol=0, atol=1e-12)
    return {**found, "error": E}


@pytest.mark.parametrize("case", CASES)
def test_shares_are_those_of_the_definition(case: str) -> None:
    torch.manual_seed(0)
    build, shape, counts, last = CASES[case]
    model, x, y = build().double().eval(), torch.randn(shape, dtype=torch.float64) + 0.4, torch.randint(3, counts)
    loss = "cross_entropy:class_axis=last" if last else "cross_entropy"
    inputs: tuple[Tensor, ...] = (x,)
    if case == "padded":
        inputs = (x, torch.arange(4) < torch.tensor([4, 2, 3, 1, 4])[:, None])
    run = curvscope.analyze(model, (inputs, y), loss=loss, dtype="float64")

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.transpose(1, 2) if last else outputs, targets)

    H = output_hessian(loss_fn, call(model, inputs).detach(), y)
    checked = 0
    for layer, found in run.layers.items():
        if not found.sources:
            continue
        weight, *bias = parameters_of(run, layer)
        io = layer_io(model, inputs, weight, *bias)
        values, vectors = torch.linalg.eigh(H)
        roots = vectors * values.clamp_min(0).sqrt().unsqueeze(1)  # [N, D, K]
        g = torch.einsum("ndk,ndro->nkro", roots, io.jacobian)
        columns = torch.einsum("nkro,nri->nkoi", g, io.a).flatten(0, 1).flatten(1)
        G = columns.T @ columns
        real = inputs[1] if len(inputs) > 1 and io.a.shape[1] == 4 else torch.ones(io.a.shape[:2], dtype=torch.bool)
        means = (io.a * real[..., None]).sum(1, keepdim=True) / real.sum(1).view(-1, 1, 1)
        expand = terms(io.a, g, G, real)
        reduce = terms(means, g.sum(2, keepdim=True), G, torch.ones(means.shape[:2], dtype=torch.bool))
        for flavour, dense in (("expand", expand), ("reduce", reduce)):
            row = found.sources[f"kfac_{flavour}"]
            assert row.status == "ok", row
            for name in ("spread", "mean", "cross"):
                share = float((dense[name] * dense["error"]).sum() / dense["error"].square().sum())
                assert getattr(row, name) == pytest.approx(share, abs=1e-8), (layer, flavour, name)
            assert row.relative == pytest.approx(float(dense["error"].norm() / G.norm()), rel=1e-8)
            checked += 1
    assert checked >= 4
