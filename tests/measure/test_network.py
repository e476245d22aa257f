"""The whole network's gradient and curvature products against dense float64 autograd, and matrices of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvscope.graph.matrix import to_matrix, to_parameters
from curvscope.measure.network import Network, combined, dot, norm
from tests import models
from tests.networks import graph_and_network
from tests.test_untouched import fingerprint, same


class Branching(nn.Module):
    """Data-dependent control flow: export refuses it and the eager fallback runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 3), nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(3) * 1.5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)) * self.scale
        return self.head(h) if float(x.sum()) > -1e9 else h


class Upsampling(nn.Module):
    """A transposed convolution, whose weight is stored [d_in, d_out, ...], a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.head = nn.ConvTranspose1d(2, 3, 2), nn.LayerNorm(5), nn.Linear(15, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.up(x))).flatten(1))


def images() -> Tensor:
    return torch.randn(3, 2, 8, 8, dtype=torch.float64)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Callable[[], Any], str]] = {
    "mlp": (lambda: models.mlp(4, 5, 3), lambda: torch.randn(6, 4), lambda: torch.randint(3, (6,)), "cross_entropy"),
    "mse": (lambda: models.mlp(4, 5, 3), lambda: torch.randn(6, 4), lambda: torch.randn(6, 3), "mse"),
    "cnn": (models.ResidualCNN, images, lambda: torch.randint(3, (3,)), "cross_entropy"),
    "attention": (
        models.SelfAttention,
        lambda: torch.randn(3, 5, 4),
        lambda: torch.randint(3, (3,)),
        "cross_entropy",
    ),
    "transposed": (Upsampling, lambda: torch.randn(3, 2, 4), lambda: torch.randint(3, (3,)), "cross_entropy"),
    "eager": (Branching, lambda: torch.randn(6, 4), lambda: torch.randint(3, (6,)), "cross_entropy"),
}


def built(name: str) -> tuple[nn.Module, Any, Any, Network, Any]:
    torch.manual_seed(0)
    make, inputs, targets, loss = CASES[name]
    model, x, y = make().double().eval(), inputs().double(), targets()
    y = y.double() if y.is_floating_point() else y
    graph, network = graph_and_network(model, x, y, loss)
    return model, x, y, network, graph


def dense(model: nn.Module, x: Any, y: Tensor, loss: str) -> tuple[Tensor, Tensor, Tensor, list[str], Callable]:
    """Gradient, Hessian and GGN over all parameters in order, by plain autograd on the model itself."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    loss_of = nn.functional.cross_entropy if loss == "cross_entropy" else nn.functional.mse_loss

    def outputs(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        given = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(model, given, (x,))

    H = torch.autograd.functional.hessian(lambda v: loss_of(outputs(v), y), flat)
    J = torch.autograd.functional.jacobian(lambda v: outputs(v).flatten(), flat)
    f = outputs(flat).detach()
    inner = torch.autograd.functional.hessian(lambda o: loss_of(o.view(f.shape), y), f.flatten())
    gradient = torch.autograd.functional.jacobian(lambda v: loss_of(outputs(v), y), flat)

    def split(vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

    return gradient, H, J.T @ inner @ J, names, split


@pytest.mark.parametrize("name", CASES)
def test_gradient_and_products_are_the_dense_ones(name: str) -> None:
    model, x, y, network, _ = built(name)
    gradient, H, G, names, split = dense(model, x, y, CASES[name][3])
    before = fingerprint(model)
    vector = torch.randn(gradient.numel(), dtype=torch.float64)
    for got, want in (
        (network.gradient(), gradient),
        (network.hessian_product()(split(vector)), H @ vector),
        (network.ggn_product()(split(vector)), G @ vector),
    ):
        flat = torch.cat([got[key].flatten() for key in names])
        assert float((flat - want).norm()) <= 1e-10 * float(want.norm())
    assert same(list(before.values()), list(fingerprint(model).values()))


@pytest.mark.parametrize("name", CASES)
def test_the_loss_elsewhere_is_a_forward_pass_there(name: str) -> None:
    model, x, y, network, _ = built(name)
    before = fingerprint(model)
    step = {key: torch.randn_like(p) for key, p in network.parameters.items()}
    there = network.loss(network.moved(step, 0.3))
    assert network.loss() == pytest.approx(network.loss({}), rel=1e-14)
    assert same(list(before.values()), list(fingerprint(model).values()))
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.add_(0.3 * step[key])
        loss = nn.functional.cross_entropy if CASES[name][3] == "cross_entropy" else nn.functional.mse_loss
        assert there == pytest.approx(float(loss(model(x), y)), rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_a_layers_matrix_and_back(name: str) -> None:
    *_, network, graph = built(name)
    gradient = network.gradient()
    shapes = {key: p.shape for key, p in network.parameters.items()}
    for spec in graph.layers.values():
        matrix = to_matrix(spec, gradient)
        assert matrix.shape == (spec.d_out, spec.d_in + (spec.bias is not None))
        for key, tensor in to_parameters(spec, matrix, shapes).items():
            assert torch.equal(tensor, gradient[key])


class Unread(nn.Module):
    """A parameter that the forward pass does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.unread = nn.Linear(4, 3), nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def test_parameters_that_are_not_reached_are_left_out() -> None:
    torch.manual_seed(0)
    _, network = graph_and_network(Unread(), torch.randn(5, 4), torch.randint(3, (5,)), "cross_entropy")
    assert set(network.parameters) == {"head.weight", "head.bias"}
    assert network.loss({"unread": torch.zeros(2)}) == network.loss()


def test_the_quadratic_form_is_the_product_along_the_vector() -> None:
    *_, network, _ = built("cnn")
    vector = {key: torch.randn_like(p) for key, p in network.parameters.items()}
    assert network.ggn_form()(vector) == pytest.approx(dot(vector, network.ggn_product()(vector)), rel=1e-12)


def test_vectors() -> None:
    left = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])}
    assert norm({"a": left["a"]}) == 5.0
    assert dot(left, {"a": torch.tensor([1.0, 1.0])}) == 7.0
    assert torch.equal(combined(left, {"a": torch.tensor([1.0, 1.0])}, -2.0)["a"], torch.tensor([1.0, 2.0]))


def test_a_parameter_that_is_never_read_is_no_part_of_the_network() -> None:
    torch.manual_seed(0)
    model = models.mlp(4, 5, 3).double()
    model.unused = nn.Parameter(torch.ones(7, dtype=torch.float64))
    _, network = graph_and_network(model, torch.randn(6, 4).double(), torch.randint(3, (6,)), "cross_entropy")
    assert set(network.parameters) == set(dict(model.named_parameters())) - {"unused"}
    assert set(network.gradient()) == set(network.parameters)
