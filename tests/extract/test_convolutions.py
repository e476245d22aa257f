"""Grouped, depthwise and transposed convolutions against rows taken from autograd alone.

For any linear layer a[n, r, i] is the derivative of one output at position r with respect to that output's i-th weight,
whatever strides, padding and groups do: no patch is cut here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.run import Run
from tests import reference

CASES: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(2, 3, 2, stride=2, padding=1), (4, 4)),
    "grouped_1d": (lambda: nn.Conv1d(4, 6, 2, groups=2), (5,)),
    "grouped_2d": (lambda: nn.Conv2d(4, 4, (2, 3), stride=(2, 1), padding=(1, 1), groups=2), (4, 4)),
    "grouped_no_bias": (lambda: nn.Conv2d(4, 6, 2, groups=2, bias=False), (3, 3)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, padding=1, groups=3), (4, 4)),
    "depthwise_multiplied": (lambda: nn.Conv2d(2, 6, 2, groups=2, dilation=2), (4, 4)),
    "grouped_3d": (lambda: nn.Conv3d(2, 4, 2, groups=2), (2, 3, 3)),
    "transposed_1d": (lambda: nn.ConvTranspose1d(3, 2, 3, stride=2, padding=1, output_padding=1), (4,)),
    "transposed_2d": (lambda: nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (3, 2)),
    "transposed_no_bias": (lambda: nn.ConvTranspose2d(2, 2, 2, stride=3, bias=False), (2, 2)),
    "transposed_cropped": (lambda: nn.ConvTranspose1d(2, 3, 2, padding=2), (6,)),
    "transposed_grouped": (lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=(2, 1), padding=(0, 1), groups=2), (2, 3)),
    "transposed_depthwise": (lambda: nn.ConvTranspose1d(3, 3, 3, stride=2, groups=3, bias=False), (3,)),
    "transposed_3d": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1)), (2, 2, 1)),
}
EXAMPLES, CLASSES = 4, 3


@cache
def problem(name: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(11)
    make, size = CASES[name]
    layer = make()
    inputs = torch.randn(EXAMPLES, layer.in_channels, *size)
    width = layer(inputs)[0].numel()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(width, CLASSES)).double()
    return model, inputs.double(), torch.randint(CLASSES, (EXAMPLES,))


@cache
def run_of(name: str, dump: tuple[str, ...]) -> Run:
    model, inputs, targets = problem(name)
    return curvscope.analyze(
        model,
        (inputs, targets),
        loss="cross_entropy",
        dtype="float64",
        fisher="exact",
        measure=("spectral", "kron_best"),
        dump=dump,
    )


@cache
def naive(name: str) -> dict[str, Any]:
    """Per group: A and B of both flavours and the dense block, from Jacobians."""
    model, inputs, targets = problem(name)
    layer = model[0]
    transposed, groups = isinstance(layer, nn.modules.conv._ConvTransposeNd), layer.groups
    weight = layer.weight.detach()

    def of_weight(w: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": w}, (inputs,))

    out = layer(inputs).detach()  # [N, O, *positions]
    J = torch.func.jacrev(of_weight)(weight)  # [N, O, *positions, *weight]
    J = J.reshape(*out.shape[:2], -1, *weight.shape)
    outputs, per = out.shape[1], out.shape[1] // groups
    if transposed:  # stored [C_in, O / groups, *kernel]: bring it to [O, C_in / groups, *kernel]
        J = J.unflatten(3, (groups, -1)).transpose(4, 5).flatten(3, 4)
    # the derivative of output o with respect to its own weights
    a = torch.stack([J[:, o, :, o].flatten(2) for o in range(outputs)], 1)  # [N, O, R, d_in]
    if layer.bias is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)

    def rest(s: Tensor) -> Tensor:
        return model[1:](s.view_as(out))

    D = torch.func.jacrev(rest)(out.flatten(2))  # [N, C, N, O, R]
    D = torch.stack([D[n, :, n] for n in range(EXAMPLES)])  # [N, C, O, R]
    H = reference.output_hessian(nn.functional.cross_entropy, model(inputs).detach(), targets)
    values, vectors = torch.linalg.eigh(H)
    S = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
    g = torch.einsum("ncor,nck->nkor", D, S)
    found: dict[str, Any] = {"A_expand": [], "A_reduce": [], "B_expand": [], "B_reduce": [], "G": []}
    for group in range(groups):
        rows = slice(group * per, (group + 1) * per)
        a_group, g_group = a[:, group * per], g[:, :, rows]
        positions = a_group.shape[1]
        found["A_expand"].append(torch.einsum("nri,nrj->ij", a_group, a_group) / (EXAMPLES * positions))
        means, sums = a_group.mean(1), g_group.sum(-1)
        found["A_reduce"].append(torch.einsum("ni,nj->ij", means, means) / EXAMPLES)
        found["B_expand"].append(torch.einsum("nkor,nkpr->op", g_group, g_group))
        found["B_reduce"].append(torch.einsum("nko,nkp->op", sums, sums))
        v = torch.einsum("nkor,nri->nkoi", g_group, a_group).flatten(0, 1).flatten(1)
        found["G"].append(v.T @ v)
    return {key: [each.detach() for each in value] for key, value in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_factors(name: str) -> None:
    layer = run_of(name, ()).layers["0"]
    want = naive(name)
    groups = layer.row.groups
    for flavour in ("expand", "reduce"):
        for which in "AB":
            got = getattr(layer.factors[flavour], which)
            expected = torch.stack(want[f"{which}_{flavour}"])
            expected = expected if groups > 1 else expected[0]
            np.testing.assert_allclose(got, expected.numpy(), rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("dump", [("blocks",), ("blocks", "columns")], ids=["formed", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_block_errors_and_spectra(name: str, dump: tuple[str, ...]) -> None:
    layer = run_of(name, dump).layers["0"]
    want = naive(name)
    G = torch.block_diag(*want["G"])
    np.testing.assert_allclose(layer.block, G.numpy(), rtol=1e-8, atol=1e-11 * float(G.abs().max()))
    assert layer.row.parameters == G.shape[0] == sum(p.numel() for p in problem(name)[0][0].parameters())
    for flavour in ("expand", "reduce"):
        M = torch.block_diag(
            *[torch.kron(B, A) for A, B in zip(want[f"A_{flavour}"], want[f"B_{flavour}"], strict=True)]
        )
        expected = reference.errors(G, M)
        row = layer.errors[f"kfac_{flavour}"]
        for key, value in expected.items():
            assert getattr(row, key) == pytest.approx(value, rel=1e-8, abs=1e-10), (flavour, key)
        spectrum = torch.linalg.eigvalsh(M).flip(0)
        got = layer.spectrum[f"kfac_{flavour}"]
        np.testing.assert_allclose(got, spectrum[: len(got)].numpy(), atol=1e-10 * float(spectrum[0]))
    eigenvalues = torch.linalg.eigvalsh(G).flip(0)
    got = layer.spectrum["ggn"]
    np.testing.assert_allclose(got, eigenvalues[: len(got)].numpy(), atol=1e-10 * float(eigenvalues[0]))
    best = [
        reference.kron_best(block, B.shape[0], A.shape[0])
        for block, A, B in zip(want["G"], want["A_expand"], want["B_expand"], strict=True)
    ]
    nearest = float((G - torch.block_diag(*best)).norm() / G.norm())
    assert layer.errors["kron_best"].rel_frobenius == pytest.approx(nearest, rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradient(name: str) -> None:
    model, inputs, targets = problem(name)
    loss = nn.functional.cross_entropy(model(inputs), targets)
    grads = torch.autograd.grad(loss, list(model[0].parameters()))
    norm = sum(float(grad.square().sum()) for grad in grads) ** 0.5
    assert run_of(name, ()).layers["0"].attributes["gradient_norm"] == pytest.approx(norm, rel=1e-10)


@pytest.mark.parametrize("name", ["depthwise", "grouped_1d", "transposed_2d"])
def test_estimates_agree_within_their_errors(name: str) -> None:
    model, inputs, targets = problem(name)
    run = curvscope.analyze(
        model, (inputs, targets), loss="cross_entropy", dtype="float64", fisher="probe", samples=64, seed=5
    )
    for approximation in ("kfac_expand", "kfac_reduce", "diag"):
        got = run.layers["0"].errors[approximation]
        want = run_of(name, ()).layers["0"].errors[approximation]
        assert abs(got.rel_frobenius - want.rel_frobenius) <= 5 * got.rel_frobenius_stderr
