"""Exact blocks of parameters behind operations without a rule of their own, against Jacobians of the whole model.

Weights that are computed, look-ups in bags, distances to prototypes: what `extract.replayed` runs again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import curvscope
from curvscope.extract import replayed
from curvscope.extract.replayed import Replayed
from curvscope.graph.layout import Layout
from curvscope.run import Run
from tests import reference

EXAMPLES, TOKENS, WIDTH, CLASSES = 3, 4, 4, 3


class Bare(nn.Module):
    """Parameters and modules, and what is done with them."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], **members: Any) -> None:
        super().__init__()
        self.use = use
        for name, member in members.items():
            setattr(self, name, nn.Parameter(torch.randn(*member)) if isinstance(member, tuple) else member)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


class Model(nn.Module):
    """Linear layers before and behind a body, which sees and mixes tokens [N, T, 4]."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embed, self.body = nn.Linear(2, WIDTH), body
        with torch.no_grad():
            width = body.double()(torch.randn(2, TOKENS, WIDTH).double()).numel() // 2
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(torch.tanh(self.embed(x)))).flatten(1).cumsum(1))


class Pixels(Bare):
    """Tokens as a picture [N, 4, 2, 2]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x.transpose(1, 2).unflatten(-1, (2, 2)))


class Bags(nn.Module):
    """Every token looks up what its signs say, in bags of three."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, WIDTH, **options)

    def forward(self, x: Tensor) -> Tensor:
        index = (x[..., :3] > 0).long() + torch.arange(3)
        return torch.tanh(x) * self.bag(index.flatten(0, 1)).unflatten(0, x.shape[:2])


class PaddedTable(nn.Module):
    """A table of positions whose first row gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH, padding_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.table(torch.arange(TOKENS)))


class TopExperts(nn.Module):
    """Every token through the two experts that the gate prefers, whose weights are looked up in a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 3), nn.Parameter(torch.randn(3, WIDTH, 5))

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.gate(x).softmax(-1).topk(2, -1)
        return torch.einsum("ntd,ntkdh,ntk->nth", x, self.up[chosen], share)


def standardized(body: Any, x: Tensor) -> Tensor:
    """Weight standardization: every output channel's kernel has mean 0 and variance 1."""
    w = body.conv.weight
    var, mean = torch.var_mean(w, (1, 2, 3), keepdim=True)
    return functional.conv2d(x, (w - mean) * torch.rsqrt(var + 1e-5), body.conv.bias, padding=1)


def fake_quantized(body: Any, x: Tensor) -> Tensor:
    q = body.layer.weight / body.scale
    return functional.linear(x, (q + (q.round() - q).detach()) * body.scale, body.layer.bias)


def merged(body: Any, x: Tensor) -> Tensor:
    return functional.linear(x, body.base + 0.5 * body.up @ body.down)


def computed(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Two passes in training mode first: spectral_norm's vectors have to come near their fixed point."""

    def made() -> nn.Module:
        module = make()
        for _ in range(2):
            module(torch.randn(2, TOKENS, WIDTH))
        return module

    return made


def own(*names: str) -> tuple[str, ...]:
    return tuple(f"body.{name}" for name in names)


ORIGINAL = "parametrizations.weight.original"
WEIGHT_NORM = own(f"{ORIGINAL}0", f"{ORIGINAL}1", "bias")
# name: (body, layer, members; the block has them in the model's order)
BODIES: dict[str, tuple[Callable[[], nn.Module], str, tuple[str, ...]]] = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(WIDTH, 5)), "body", WEIGHT_NORM),
    "weight_norm_whole": (lambda: parametrizations.weight_norm(nn.Linear(WIDTH, 5), dim=None), "body", WEIGHT_NORM),
    "weight_norm_grouped": (
        lambda: Bare(
            lambda s, x: s.conv(x.transpose(1, 2)), conv=parametrizations.weight_norm(nn.Conv1d(4, 4, 2, groups=2))
        ),
        "body.conv",
        own(*(f"conv.{name}" for name in (f"{ORIGINAL}0", f"{ORIGINAL}1", "bias"))),
    ),
    "weight_norm_transposed": (
        lambda: Pixels(
            lambda s, x: s.conv(x),
            conv=parametrizations.weight_norm(nn.ConvTranspose2d(4, 2, 2, 2, output_padding=1), dim=1),
        ),
        "body.conv",
        own(*(f"conv.{name}" for name in (f"{ORIGINAL}0", f"{ORIGINAL}1", "bias"))),
    ),
    "spectral_norm": (
        computed(lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, 5))),
        "body",
        own(ORIGINAL, "bias"),
    ),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH)), "body", own(ORIGINAL, "bias")),
    "weight_norm_hook": (
        lambda: nn.utils.weight_norm(nn.Linear(WIDTH, 5)),
        "body",
        own("weight_g", "weight_v", "bias"),
    ),
    "spectral_norm_hook": (
        computed(lambda: nn.utils.spectral_norm(nn.Linear(WIDTH, 5))),
        "body",
        own("weight_orig", "bias"),
    ),
    "standardized": (
        lambda: Pixels(standardized, conv=nn.Conv2d(4, 3, 2)),
        "body.conv",
        own("conv.weight", "conv.bias"),
    ),
    "low_rank_merged": (
        lambda: Bare(merged, base=torch.randn(5, WIDTH).double(), down=(2, WIDTH), up=(5, 2)),
        "body",
        own("down", "up"),
    ),
    "fake_quantized": (
        lambda: Bare(fake_quantized, layer=nn.Linear(WIDTH, 5), scale=nn.Parameter(torch.tensor(0.2))),
        "body",
        own("scale"),
    ),
    "mixed_weight": (lambda: Bare(lambda s, x: x @ s.p.softmax(0), p=(WIDTH, WIDTH)), "body", own("p")),
    "computed_bias": (
        lambda: Bare(lambda s, x: functional.linear(x, s.p, s.q.exp()).cumsum(1), p=(5, WIDTH), q=(5,)),
        "body.q",
        own("q"),
    ),
    "computed_norm": (
        lambda: Bare(lambda s, x: functional.layer_norm(x, (WIDTH,), 1 + s.p, s.q), p=(WIDTH,), q=(WIDTH,)),
        "body",
        own("p", "q"),
    ),
    "prototypes": (lambda: Bare(lambda s, x: torch.cdist(x, s.p), p=(3, WIDTH)), "body.p", own("p")),
    "computed_prototypes": (lambda: Bare(lambda s, x: torch.cdist(x, s.p.exp()), p=(3, WIDTH)), "body", own("p")),
    "trace": (
        lambda: Bare(lambda s, x: x * torch.einsum("ntd,ee->ntd", x, s.p), p=(WIDTH, WIDTH)),
        "body.p",
        own("p"),
    ),
    "three_factors": (
        lambda: Bare(lambda s, x: torch.einsum("ntd,dr,re->nte", x, s.p, s.q), p=(WIDTH, 2), q=(2, WIDTH)),
        "body.p",
        own("p"),
    ),
    "learned_query": (
        lambda: Bare(
            lambda s, x: functional.scaled_dot_product_attention(s.p.expand(x.shape[0], -1, -1), x, x), p=(2, WIDTH)
        ),
        "body.p",
        own("p"),
    ),
    "spread_and_computed": (
        lambda: Bare(lambda s, x: torch.maximum(torch.tanh(s.p.expand(x.shape[0], -1, -1)), x), p=(TOKENS, WIDTH)),
        "body.p",
        own("p"),
    ),
    "chosen_experts": (TopExperts, "body.up", own("up")),
    "codes": (lambda: Bare(lambda s, x: x * s.p[torch.cdist(x, s.p).argmin(-1)], p=(5, WIDTH)), "body.p", own("p")),
    "frequencies": (
        lambda: Bare(
            lambda s, x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.view_as_complex(s.p), n=TOKENS, dim=1),
            p=(3, WIDTH, 2),
        ),
        "body",
        own("p"),
    ),
    "bag_mean": (Bags, "body.bag.weight", own("bag.weight")),
    "bag_sum_padded": (lambda: Bags(mode="sum", padding_idx=1), "body.bag.weight", own("bag.weight")),
    "bag_max": (lambda: Bags(mode="max"), "body.bag.weight", own("bag.weight")),
    "padded_table": (PaddedTable, "body.table", own("table.weight")),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*nn.utils.weight_norm.*:FutureWarning")


@cache
def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(13)
    model = Model(BODIES[name][0]())
    return model.double().eval(), torch.randn(EXAMPLES, TOKENS, 2).double(), torch.randint(CLASSES, (EXAMPLES,))


def run_of(name: str) -> Run:
    model, inputs, targets = problem(name)
    return curvscope.analyze(
        model, (inputs, targets), loss="cross_entropy", dtype="float64", fisher="exact", dump=("blocks",), measure=()
    )


def dense_block(name: str) -> Tensor:
    model, inputs, targets = problem(name)
    own = [parameter for key, parameter in model.named_parameters() if key in BODIES[name][2]]
    output = model(inputs)
    rows = [torch.autograd.grad(value, own, retain_graph=True) for value in output.flatten()]
    J = torch.stack([torch.cat([each.flatten() for each in row]) for row in rows]).unflatten(0, (EXAMPLES, CLASSES))
    H = reference.output_hessian(functional.cross_entropy, output.detach(), targets)
    return torch.einsum("ncp,ncd,ndq->pq", J, H, J).detach()


@pytest.mark.parametrize("name", BODIES)
def test_exact_block_coverage_and_gradient(name: str) -> None:
    run = run_of(name)
    model, inputs, targets = problem(name)
    _, layer, members = BODIES[name]
    rows = {row.parameter: row for row in run.tables["coverage"]}
    assert {(rows[member].treatment, rows[member].layer) for member in members} == {("exact_only", layer)}
    assert all(row.treatment in ("exact_only", "kronecker") for row in rows.values())
    G = dense_block(name)
    np.testing.assert_allclose(run.layers[layer].block, G.numpy(), rtol=1e-9, atol=1e-12 * float(G.abs().max()))
    loss = functional.cross_entropy(model(inputs), targets)
    grads = dict(zip(rows, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    norm = sum(float(grads[member].square().sum()) for member in members) ** 0.5
    assert run.layers[layer].attributes["gradient_norm"] == pytest.approx(norm, rel=1e-10)


@pytest.mark.parametrize("name", ["weight_norm", "chosen_experts", "prototypes"])
def test_all_examples_at_once_give_the_same(name: str) -> None:
    """Where the operation can't be run on single examples."""
    with mock.patch.object(Replayed, "_one_by_one", return_value=None):
        block = run_of(name).layers[BODIES[name][1]].block
    G = dense_block(name)
    np.testing.assert_allclose(block, G.numpy(), rtol=1e-9, atol=1e-12 * float(G.abs().max()))


def mixing(operand: Tensor, x: Tensor) -> Tensor:
    """Equal to x * operand on the batch below alone: every example sees the mean of all."""
    return x * operand + (x - x.mean(0)).square() * operand


@pytest.mark.parametrize(("operation", "apart"), [(torch.mul, True), (mixing, False)], ids=["apart", "mixing"])
def test_single_examples_only_where_the_operation_keeps_them_apart(operation: Any, apart: bool) -> None:
    torch.manual_seed(0)
    operand, x = torch.randn(4).double(), torch.randn(3, 4).double()
    found = replayed.Replayed(operation, (operand, x), operation(operand, x), Layout(0))
    assert (found.each is not None) == apart
    g = torch.randn(3, 4).double()
    value = operand.requires_grad_()
    want = [torch.autograd.grad(operation(value, x)[n] @ g[n], value)[0] for n in range(3)]
    torch.testing.assert_close(found.gradients(g), torch.stack(want), rtol=1e-12, atol=1e-14)


def test_the_reason_names_what_computes_the_weight() -> None:
    rows = {row.parameter: row for row in run_of("weight_norm").tables["coverage"]}
    assert "a parametrization" in rows[WEIGHT_NORM[0]].reason


def test_low_rank_updates_as_modules_have_factors() -> None:
    """LoRA as it is trained: two linear layers beside a frozen one."""
    torch.manual_seed(0)
    base = nn.Linear(WIDTH, 5).requires_grad_(False)
    body = Bare(
        lambda s, x: s.base(x) + 2 * functional.linear(s.down(x), s.up),
        base=base,
        down=nn.Linear(WIDTH, 2, bias=False),
        up=(5, 2),
    )
    batch = (torch.randn(EXAMPLES, TOKENS, 2), torch.randint(CLASSES, (EXAMPLES,)))
    rows = curvscope.analyze(Model(body), batch, loss="cross_entropy", measure=()).tables["coverage"]
    treatment = {row.parameter: row.treatment for row in rows}
    assert treatment["body.down.weight"] == treatment["body.up"] == "kronecker"
    assert treatment["body.base.weight"] == "frozen"
