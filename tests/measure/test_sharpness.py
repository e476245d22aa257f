"""Top eigenvalues, plain and preconditioned, whole and by layer, against dense float64 matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from curvscope.load.optimizer_settings import OptimizerSettings, ParameterSettings, optimizer_settings
from curvscope.load.problem import OptimizerState
from curvscope.measure.network import Network
from curvscope.measure.preconditioner import Preconditioner, Unassessable, preconditioner
from curvscope.measure.sharpness import Space, energy_shares, preconditioned, restricted, sharpness
from curvscope.measure.thresholds import dynamics
from curvscope.records import KroneckerFactors
from tests.measure.test_network import CASES, built, dense

NAMES = ["mlp", "mse", "cnn", "attention", "transposed", "eager"]


def indices(names: list[str], network: Network, wanted: list[str]) -> Tensor:
    position, found = 0, []
    for name in names:
        count = network.parameters[name].numel()
        if name in wanted:
            found.append(torch.arange(position, position + count))
        position += count
    return torch.cat(found)


@pytest.mark.parametrize("name", NAMES)
def test_whole_and_blocks_are_the_dense_ones(name: str) -> None:
    model, x, y, network, graph = built(name)
    _, H, G, names, _ = dense(model, x, y, CASES[name][3])
    for product, M in ((network.hessian_product(), H), (network.ggn_product(), G)):
        parts = {"": names} | {s.name: [s.weight, *([s.bias] if s.bias else [])] for s in graph.layers.values()}
        for members in parts.values():
            space = Space.of(network, members)
            at = indices(names, network, members)
            values = torch.linalg.eigvalsh(M[at][:, at])
            count = min(3, space.size)
            found = sharpness(
                restricted(product, network, space), space, top=count, bottom=1, tolerance=1e-10, max_products=400
            )
            scale = float(values.abs().max())
            got = [pair.value for pair in found.top]
            assert got[0] == pytest.approx(float(values[-1]), abs=1e-8 * scale)
            assert found.top[0].converged
            if name == "mlp":  # with repeated eigenvalues (mse) each is found once
                assert got == pytest.approx(values.flip(0)[:count].tolist(), abs=1e-7 * scale)


def random_settings(kind: str, network: Network, **common: Any) -> OptimizerSettings:
    generator = torch.Generator().manual_seed(5)
    parameters = {}
    for number, (name, p) in enumerate(network.parameters.items()):
        v = torch.rand(p.shape, generator=generator, dtype=torch.float64)
        moments = {"exp_avg_sq": v, "square_avg": v, "sum": v}
        parameters[name] = ParameterSettings(
            lr=0.1 if number % 2 else 0.3, moments=moments, step=5, beta1=0.9, beta2=0.99, eps=1e-3, **common
        )
    return OptimizerSettings(kind, kind, parameters, damping=0.1)


@pytest.mark.parametrize("kind", ["sgd", "adam", "rmsprop", "adagrad"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_preconditioned_is_the_dense_generalised_eigenvalue(kind: str, decoupled: bool) -> None:
    model, x, y, network, _ = built("mlp")
    _, H, _, names, _ = dense(model, x, y, CASES["mlp"][3])
    settings = random_settings(kind, network, weight_decay=0.2, decoupled=decoupled)
    P = preconditioner(settings, names)
    assert isinstance(P, Preconditioner)
    space = Space.of(network, names)
    matvec = preconditioned(network.hessian_product(), network, space, P)
    found = sharpness(matvec, space, tolerance=1e-11, max_products=300).top[0]
    # at the boundary x flips its sign: P_i threshold_i x_i = (H + wd) x
    T = []
    for name in names:
        one = settings.parameters[name]
        v = one.moments["sum"].flatten()
        if kind == "sgd":
            D = torch.ones_like(v)
        elif kind == "adam":
            D = (1 - 0.9**5) * ((v / (1 - 0.99**5)).sqrt() + 1e-3)
        else:
            D = v.sqrt() + 1e-3
        T.append(D * dynamics(kind, one).threshold)
    T = torch.cat(T)
    decayed = H + (0.0 if decoupled else 0.2) * torch.eye(len(T), dtype=T.dtype)
    ratio = torch.linalg.eigvalsh(decayed / torch.outer(T, T).sqrt())[-1]
    assert found.value / P.step.threshold == pytest.approx(float(ratio), rel=1e-8)


def kfac_case(kind: str) -> tuple[Network, Any, list[str], Tensor, dict[str, dict[str, KroneckerFactors]]]:
    model, x, y, network, graph = built(kind)
    _, H, _, names, _ = dense(model, x, y, CASES[kind][3])
    rng = np.random.default_rng(0)
    factors = {}
    for spec in graph.layers.values():
        a, b = (rng.normal(size=(n, n)) for n in (spec.d_in + (spec.bias is not None), spec.d_out))
        factors[spec.name] = {"expand": KroneckerFactors("expand", a @ a.T, b @ b.T)}
    return network, graph, names, H, factors


@pytest.mark.parametrize("kind", ["mlp", "transposed"])
def test_kfac_is_the_dense_damped_kronecker_product(kind: str) -> None:
    network, graph, names, H, factors = kfac_case(kind)
    norm = [spec.name for spec in graph.layers.values() if spec.exact_only]
    for name in norm:
        factors.pop(name)
    settings = random_settings("kfac", network)
    equal = {name: ParameterSettings(0.1) for name in settings.parameters}
    P = preconditioner(OptimizerSettings("kfac", "K-FAC", equal, damping=0.3), names, graph.layers, factors)
    assert isinstance(P, Preconditioner)
    assert bool(P.fixed) == bool(norm)
    space = Space.of(network, P.names)
    matvec = preconditioned(network.hessian_product(), network, space, P)
    found = sharpness(matvec, space, tolerance=1e-11, max_products=300).top[0]
    at, blocks = [], []
    for spec in graph.layers.values():
        if spec.name not in factors:
            continue
        pair = factors[spec.name]["expand"]
        full = torch.kron(torch.tensor(pair.B), torch.tensor(pair.A))
        # the positions of the matrix' entries, row by row with the bias last, in the flat order of the parameters
        weight = indices(names, network, [spec.weight]).view(network.parameters[spec.weight].shape)
        weight = (weight.transpose(0, 1) if "transpose" in spec.kind else weight).flatten(1)
        bias = indices(names, network, [spec.bias])[:, None]
        at.append(torch.cat([weight, bias], dim=1).flatten())
        blocks.append(full + 0.3 * torch.eye(len(full), dtype=full.dtype))
    order = torch.cat(at)
    dense_P = torch.block_diag(*blocks)
    values = torch.linalg.eigvals(torch.linalg.solve(dense_P, H[order][:, order])).real
    assert found.value == pytest.approx(float(values.max()), rel=1e-8)


@pytest.mark.parametrize("inverse", [False, True])
def test_shampoo_is_the_dense_product_of_roots(inverse: bool) -> None:
    model, x, y, network, _ = built("mlp")
    _, H, _, names, _ = dense(model, x, y, CASES["mlp"][3])
    generator = torch.Generator().manual_seed(1)
    state, blocks = {}, []
    for index, name in enumerate(names):
        entry, product = {}, torch.ones(1, 1, dtype=torch.float64)
        shape = network.parameters[name].shape
        for axis, size in enumerate(shape):
            root = torch.randn(size, size, generator=generator, dtype=torch.float64)
            L = root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)
            values, vectors = torch.linalg.eigh(L)
            values = values + (0.0 if inverse else 0.01)
            power = (vectors * values ** (-1 / (2 * len(shape)))) @ vectors.T
            if inverse:
                entry[f"inv_precond_{axis}"] = power
            else:
                entry.setdefault("preconditioners", []).append(L)
            product = torch.kron(product, power)
        state[index] = entry
        blocks.append(product)
    saved = {"state": state, "param_groups": [{"lr": 0.1, "epsilon": 0.01, "params": list(range(len(names)))}]}
    shapes = {name: p.shape for name, p in network.parameters.items()}
    settings = optimizer_settings(OptimizerState("Shampoo", tuple(names), saved), shapes)
    P = preconditioner(settings, names)
    assert isinstance(P, Preconditioner)
    space = Space.of(network, names)
    found = sharpness(
        preconditioned(network.hessian_product(), network, space, P), space, tolerance=1e-11, max_products=300
    ).top[0]
    values = torch.linalg.eigvals(torch.block_diag(*blocks) @ H).real
    assert found.value == pytest.approx(float(values.max()), rel=1e-8)


def test_energy_shares_sum_to_one() -> None:
    *_, network, _ = built("mlp")
    space = Space.of(network)
    layers = {name: [name] for name in network.parameters}
    shares = energy_shares(torch.randn(space.size, dtype=torch.float64), space, layers)
    assert sum(shares.values()) == pytest.approx(1.0, rel=1e-12)


def test_what_has_no_preconditioner_says_why() -> None:
    *_, network, graph = built("mlp")
    names = list(network.parameters)
    still = {name: ParameterSettings(0.0) for name in names}
    found = preconditioner(OptimizerSettings("sgd", "SGD", still), names)
    assert isinstance(found, Unassessable)
    assert "nothing moves" in found.reason
    settings = random_settings("rmsprop", network)
    one = settings.parameters[names[0]]
    broken = {name: ParameterSettings(0.1, moments={"square_avg": 0 * one.moments["sum"]}) for name in names[:1]}
    found = preconditioner(OptimizerSettings("rmsprop", "RMSprop", broken), names)
    assert isinstance(found, Unassessable)
    assert "not positive" in found.reason
    found = preconditioner(
        OptimizerSettings("kfac", "K-FAC", settings.parameters, damping=0.1), names, graph.layers, {}
    )
    assert isinstance(found, Unassessable)
    assert "no layer has Kronecker factors" in found.reason
