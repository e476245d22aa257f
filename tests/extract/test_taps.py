"""Parameters without a Kronecker form: their exact block against Jacobians of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.run import Run
from tests import reference

EXAMPLES, CLASSES = 5, 3
# the oracle's own, of jacrev through weight_norm
pytestmark = pytest.mark.filterwarnings("ignore:.*performance drop because.*:UserWarning")


class Tokens(nn.Module):
    """A body on [N, 4, 6] tokens between two linear layers; the tokens are pooled."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(3, 6), body, nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(x))).mean(1))


class Bare(nn.Module):
    """One parameter and what is done with it."""

    def __init__(self, *shape: int, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(*shape))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.p)


class PositionTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1]).unsqueeze(0))


class TwoTables(nn.Module):
    """A table of tokens and one of positions meet in one addition."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(5, 6), nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        index = (x[..., 0] > 0).long() + 2 * (x[..., 1] > 0).long()
        return torch.tanh(x) * (self.tokens(index) + self.places)


class RelativeBias(nn.Module):
    """Scores of every token with every other, shifted by a table of distances: entries are read several times."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(7, 2))
        self.register_buffer("distance", torch.arange(4)[:, None] - torch.arange(4)[None] + 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 3)).transpose(1, 2)  # [N, 2, 4, 3]
        scores = heads @ heads.transpose(-1, -2)
        scores = scores + self.bias[self.distance.view(-1)].view(4, 4, 2).permute(2, 0, 1).unsqueeze(0)
        return (scores.softmax(-1) @ heads).transpose(1, 2).flatten(2)


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mid = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.mid(self.norm(x))))


class Windows(nn.Module):
    """The same parameter added in every window: rows of one example side by side on axis 0."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, 2, 6) + self.p
        return windows.reshape(x.shape)


class Images(nn.Module):
    """A norm over channels between two convolutions."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.body, self.head = nn.Conv2d(2, 4, 2), norm, nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.conv(x))).flatten(1))


class ClassToken(nn.Module):
    """A token of its own before every example's."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.mid = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return torch.tanh(self.mid(x)).cumsum(1)


class Product(nn.Module):
    """Two parameters are multiplied before any example comes in."""

    def __init__(self, *shapes: tuple[int, ...], use: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.p, self.q = (nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.p, self.q)


class DistanceNetwork(nn.Module):
    """Scores are shifted by an MLP of the distances, as Swin V2 has it: its rows belong to no example."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(1, 5), nn.ReLU(), nn.Linear(5, 2, bias=False))
        self.scale = nn.Parameter(torch.full((2, 1, 1), 0.3))
        self.register_buffer("coordinates", torch.linspace(-1, 1, 7).unsqueeze(1))
        self.register_buffer("distance", torch.arange(4)[:, None] - torch.arange(4)[None] + 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 3)).transpose(1, 2)  # [N, 2, 4, 3]
        scores = heads @ heads.transpose(-1, -2) * self.scale.clamp(max=2.0).exp()
        table = self.mlp(self.coordinates)
        shift = 4 * torch.sigmoid(table[self.distance.view(-1)].view(4, 4, 2).permute(2, 0, 1)).unsqueeze(0)
        return ((scores + shift).softmax(-1) @ heads).transpose(1, 2).flatten(2)


class Biases(nn.Module):
    """A bias whose weight is frozen, one that two weights share, one of a computed weight, one with zeros put in."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.left, self.right, self.packed = (nn.Linear(6, 6) for _ in range(4))
        self.conv = nn.Conv1d(4, 4, 1)
        self.frozen.weight.requires_grad_(False)
        self.conv.weight.requires_grad_(False)
        self.right.bias = self.left.bias
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(self.frozen(x)))
        x = torch.tanh(self.left(x)) * self.right(x) + self.normed(x)
        zeroed = self.packed.bias.clone()
        zeroed[2:4].zero_()
        return torch.tanh(nn.functional.linear(x, self.packed.weight, zeroed)).cumsum(1)


def batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        assert norm.running_mean is not None
        norm.running_mean.normal_()
    return norm


# name: (body, layer name, members in the order of the block)
BODIES: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...]]] = {
    "layer_norm": (lambda: nn.LayerNorm(6), "body", ("body.weight", "body.bias")),
    "layer_norm_two_axes": (lambda: nn.LayerNorm((4, 6)), "body", ("body.weight", "body.bias")),
    "layer_norm_no_bias": (lambda: nn.LayerNorm(6, bias=False), "body", ("body.weight",)),
    "rms_norm": (lambda: nn.RMSNorm(6), "body", ("body.weight",)),
    "called_twice": (CalledTwice, "body.norm", ("body.norm.weight", "body.norm.bias")),
    "added": (lambda: Bare(1, 4, 6, use=lambda x, p: x + p), "body.p", ("body.p",)),
    "added_first": (lambda: Bare(6, use=lambda x, p: p + x), "body.p", ("body.p",)),
    "subtracted": (lambda: Bare(4, 1, use=lambda x, p: x - p), "body.p", ("body.p",)),
    "subtracted_from": (lambda: Bare(4, 6, use=lambda x, p: p - x), "body.p", ("body.p",)),
    "scaled": (lambda: Bare(6, use=lambda x, p: p * x), "body.p", ("body.p",)),
    "scaled_view": (lambda: Bare(4, use=lambda x, p: x * p.view(1, -1, 1)), "body.p", ("body.p",)),
    "sliced": (lambda: Bare(1, 9, 6, use=lambda x, p: x + p[:, 2:6]), "body.p", ("body.p",)),
    "chosen": (lambda: Bare(4, 1, use=lambda x, p: torch.where(x > 0, p.unsqueeze(0), x)), "body.p", ("body.p",)),
    "chosen_else": (lambda: Bare(6, use=lambda x, p: torch.where(x > 0, x, p)), "body.p", ("body.p",)),
    "single_number": (lambda: Bare(1, use=lambda x, p: x * p), "body.p", ("body.p",)),
    "position_table": (PositionTable, "body.table.weight", ("body.table.weight",)),
    "table_beside_it": (TwoTables, "body.places", ("body.places",)),
    "relative_bias": (RelativeBias, "body.bias", ("body.bias",)),
    "windows": (Windows, "body.p", ("body.p",)),
    "class_token": (ClassToken, "body.token", ("body.token",)),
    "dividend": (lambda: Bare(4, 6, use=lambda x, p: p / (2 + x.square())), "body.p", ("body.p",)),
    "divisor": (lambda: Bare(6, use=lambda x, p: x / p), "body.p", ("body.p",)),
    "selected": (lambda: Bare(4, 6, use=lambda x, p: torch.where(x > 0, x, p)), "body.p", ("body.p",)),
    "selected_first": (lambda: Bare(6, use=lambda x, p: torch.where(x > 0, p, x)), "body.p", ("body.p",)),
    "addcmul": (lambda: Bare(6, use=lambda x, p: torch.addcmul(x, x.cos(), p, value=0.5)), "body.p", ("body.p",)),
    "addcmul_first": (lambda: Bare(6, use=lambda x, p: torch.addcmul(p, x, x)), "body.p", ("body.p",)),
    "mixed": (lambda: Bare(6, use=lambda x, p: torch.lerp(x, x.flip(1), p)), "body.p", ("body.p",)),
    "mixed_from": (lambda: Bare(6, use=lambda x, p: torch.lerp(p.expand_as(x), x, x.cos())), "body.p", ("body.p",)),
    "base": (lambda: Bare(6, use=lambda x, p: p.abs().pow(x)), "body", ("body.p",)),
    "exponent": (lambda: Bare(1, use=lambda x, p: (1 + x.abs()).pow(p)), "body.p", ("body.p",)),
    "prelu": (lambda: nn.PReLU(4), "body.weight", ("body.weight",)),
    "prelu_one": (lambda: nn.PReLU(), "body.weight", ("body.weight",)),
    "clamped": (lambda: Bare(6, use=lambda x, p: x * p.clamp(max=0.5).exp()), "body", ("body.p",)),
    "product": (lambda: Product((6,), (6,), use=lambda x, p, q: x + p * q), "body", ("body.p", "body.q")),
    "two_at_once": (
        lambda: Product((1, 6), (4, 6), use=lambda x, p, q: x + torch.tanh(p.expand(4, -1)) * torch.tanh(q)),
        "body",
        ("body.p", "body.q"),
    ),
    "factor_of_a_sum": (lambda: Product((6,), (6,), use=lambda x, p, q: (x + p) * q), "body.q", ("body.q",)),
    "prompts": (
        lambda: Product(
            (1, 6),
            (2, 6),
            use=lambda x, p, q: torch.cat([torch.cat([p, q]).expand(x.shape[0], -1, -1), x], 1).cumsum(1),
        ),
        "body",
        ("body.p", "body.q"),
    ),
    "distance_network": (DistanceNetwork, "body.mlp.0", ("body.mlp.0.weight", "body.mlp.0.bias")),
    "distance_network_last": (DistanceNetwork, "body.mlp.2", ("body.mlp.2.weight",)),
    "clamped_temperature": (DistanceNetwork, "body", ("body.scale",)),
    "bias_of_frozen": (Biases, "body.frozen.bias", ("body.frozen.bias",)),
    "bias_of_frozen_convolution": (Biases, "body.conv.bias", ("body.conv.bias",)),
    "bias_of_two": (Biases, "body.left.bias", ("body.left.bias",)),
    "bias_of_computed": (
        Biases,
        "body.normed",
        ("body.normed.bias", *(f"body.normed.parametrizations.weight.original{i}" for i in (0, 1))),
    ),
    "bias_with_zeros": (Biases, "body.packed.bias", ("body.packed.bias",)),
    "batch_norm": (batch_norm, "body", ("body.weight", "body.bias")),
    "group_norm": (lambda: nn.GroupNorm(2, 4), "body", ("body.weight", "body.bias")),
    "instance_norm": (lambda: nn.InstanceNorm2d(4, affine=True), "body", ("body.weight", "body.bias")),
    "layer_scale": (lambda: Bare(4, 1, 1, use=lambda x, p: x * p), "body.p", ("body.p",)),
}
IMAGES = ("batch_norm", "group_norm", "instance_norm", "layer_scale")


@cache
def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(13)
    body = BODIES[name][0]()
    with torch.no_grad():
        for parameter in body.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model = Images(body) if name in IMAGES else Tokens(body)
    inputs = torch.randn(EXAMPLES, 2, 4, 4) if name in IMAGES else torch.randn(EXAMPLES, 4, 3)
    return model.double().eval(), inputs.double(), torch.randint(CLASSES, (EXAMPLES,))


@cache
def run_of(name: str, dump: tuple[str, ...] = ("blocks",)) -> Run:
    model, inputs, targets = problem(name)
    return curvscope.analyze(model, (inputs, targets), loss="cross_entropy", dtype="float64", fisher="exact", dump=dump)


@cache
def dense_block(name: str) -> Tensor:
    model, inputs, targets = problem(name)
    members = BODIES[name][2]
    given = {key: value.detach() for key, value in model.named_parameters()}

    def outputs(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, {**given, **dict(zip(members, values, strict=True))}, (inputs,))

    jacobians = torch.func.jacrev(outputs, argnums=tuple(range(len(members))))(*(given[key] for key in members))
    J = torch.cat([each.reshape(EXAMPLES, CLASSES, -1) for each in jacobians], -1)
    H = reference.output_hessian(nn.functional.cross_entropy, model(inputs).detach(), targets)
    return torch.einsum("ncp,ncd,ndq->pq", J, H, J).detach()


@pytest.mark.parametrize("dump", [("blocks",), ("blocks", "columns")], ids=["formed", "dense"])
@pytest.mark.parametrize("name", BODIES)
def test_exact_block(name: str, dump: tuple[str, ...]) -> None:
    layer = run_of(name, dump).layers[BODIES[name][1]]
    G = dense_block(name)
    np.testing.assert_allclose(layer.block, G.numpy(), rtol=1e-9, atol=1e-12 * float(G.abs().max()))
    diagonal = float((G - torch.diag(G.diagonal())).norm() / G.norm())
    assert layer.errors["diag"].rel_frobenius == pytest.approx(diagonal, rel=1e-9, abs=1e-12)
    assert layer.spectra["ggn"].lambda_max == pytest.approx(float(torch.linalg.eigvalsh(G)[-1]), rel=1e-9)
    assert layer.errors["kfac_expand"].status == "not_assessed"
    assert "no Kronecker form" in layer.errors["kfac_expand"].reason


@pytest.mark.parametrize("name", BODIES)
def test_coverage_and_gradient(name: str) -> None:
    run = run_of(name)
    model, inputs, targets = problem(name)
    treatment = {row.parameter: row.treatment for row in run.tables["coverage"]}
    assert {treatment[member] for member in BODIES[name][2]} == {"exact_only"}
    loss = nn.functional.cross_entropy(model(inputs), targets)
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    grads = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    own = sum(float(grads[member].square().sum()) for member in BODIES[name][2]) ** 0.5
    assert run.layers[BODIES[name][1]].attributes["gradient_norm"] == pytest.approx(own, rel=1e-10)
    whole = sum(float(grad.square().sum()) for grad in grads.values()) ** 0.5
    assert run.model.gradient_norm == pytest.approx(whole, rel=1e-10)


def test_what_is_not_read_says_so() -> None:
    torch.manual_seed(0)
    batch = (torch.randn(EXAMPLES, 4, 3), torch.randint(3, (EXAMPLES,)))
    model = Tokens(Bare(6, use=lambda x, p: x))
    rows = curvscope.analyze(model, batch, loss="cross_entropy").tables["coverage"]
    row = next(row for row in rows if row.parameter == "body.p")
    assert row.treatment == "uncovered"
    assert "does not reach it" in row.reason


def test_estimates() -> None:
    model, inputs, targets = problem("layer_norm")
    run = curvscope.analyze(model, (inputs, targets), loss="cross_entropy", dtype="float64", fisher="probe", samples=64)
    got, want = run.layers["body"].errors["diag"], run_of("layer_norm").layers["body"].errors["diag"]
    assert got.status == "estimated"
    assert abs(got.rel_frobenius - want.rel_frobenius) <= 5 * got.rel_frobenius_stderr


def test_a_parameter_that_meets_no_example_is_given_up() -> None:
    """It meets an input that belongs to no example: counted as uncovered, with its gradient in the norm."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.p = Tokens(nn.Identity()), nn.Parameter(torch.randn(1, 3))

        def forward(self, x: Tensor, places: Tensor) -> Tensor:
            return self.tokens(x + torch.tanh(self.p * places))

    torch.manual_seed(0)
    model, inputs, targets = Inner(), (torch.randn(5, 4, 3), torch.randn(4, 1)), torch.randint(3, (5,))
    run = curvscope.analyze(model, (inputs, targets), loss="cross_entropy", dtype="float64")
    row = next(row for row in run.tables["coverage"] if row.parameter == "p")
    assert row.treatment == "uncovered"
    assert "no example" in row.reason
    loss = nn.functional.cross_entropy(model.double()(*(each.double() for each in inputs)), targets)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    whole = sum(float(grad.square().sum()) for grad in grads) ** 0.5
    assert run.model.gradient_norm == pytest.approx(whole, rel=1e-9)
