"""Slices of packed weights, einsum, batched products, bilinear forms and recurrent cells against Jacobians.

The exact block and the gradient are the parameters' own, by autograd through the whole model. For the factors a case
states its rows itself: what goes in and where it comes out, as plain arithmetic in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import curvscope
from curvscope.run import Run
from tests import reference

EXAMPLES, TOKENS, WIDTH, CLASSES = 4, 3, 4, 3


class Probe:
    """What a case's calls take and give, kept while the model runs: rows [N, R, d_in] and outputs [N, R, d_out]."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Sequence[int] | None, Sequence[int] | None]] = []


class Body(nn.Module):
    """Tokens [N, T, 4] to anything of [N, ...]; `probe` is told of every linear call."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["probe"] = None

    def note(
        self,
        rows: Tensor,
        outputs: Tensor,
        *,
        out: Sequence[int] | None = None,
        into: Sequence[int] | None = None,
    ) -> Tensor:
        """A call's input rows and outputs, with the rows and columns of the layer's matrix that it reads."""
        if self.probe is not None:
            outputs = outputs.clone()
            self.probe.calls.append((rows, outputs, out, into))
        return outputs


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


class Packed(Body):
    """Queries, keys and values from slices of one weight, taken in a way of their own."""

    def __init__(self, how: Callable[[Tensor], Sequence[Tensor]], bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=bias)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        weights = self.how(self.qkv.weight)
        biases = self.how(self.qkv.bias) if self.qkv.bias is not None else [None] * 3
        other = x.flip(1)[:, :2]
        parts = []
        for number, (given, weight, bias) in enumerate(zip((x, other, other), weights, biases, strict=True)):
            rows = range(WIDTH * number, WIDTH * (number + 1))
            parts.append(self.note(given, functional.linear(given, weight, bias), out=rows))
        return attend(*parts)


class FirstRows(Body):
    """A slice of the weight and of the bias; the other rows are never read."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 9)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.linear(x, self.qkv.weight[2:6], self.qkv.bias[2:6])
        return attend(*[self.note(x, out, out=range(2, 6))] * 3)


class Columns(Body):
    """A product with a concatenation, written as a sum: two slices of the columns."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * WIDTH, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        w = self.mix.weight
        left = self.note(x, functional.linear(x, w[:, :WIDTH]), into=range(WIDTH))
        shifted = torch.tanh(x.roll(1, 1))
        return left * self.note(shifted, shifted @ w[:, WIDTH:].T, into=range(WIDTH, 2 * WIDTH))


class Stacked(Body):
    """A matrix for every depth in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for depth in range(2):
            rows = range(WIDTH * depth, WIDTH * (depth + 1))
            x = torch.tanh(self.note(x, functional.linear(x, self.w[depth]), out=rows))
        return x.cumsum(1)


class Einsum(Body):
    """Self-attention by einsum, the weight stored in one of several ways."""

    def __init__(self, shape: Sequence[int], equation: str) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))
        self.equation = equation

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.einsum(self.equation, x, self.w)  # [N, heads, T, d] or [N, T, heads, d]
        order = (0, 2, 1, 3) if heads.shape[1] != x.shape[1] else (0, 1, 2, 3)
        heads = self.note(x, heads.permute(order).flatten(2)).unflatten(-1, (2, 3)).transpose(1, 2)
        return attend(heads, heads, heads).transpose(1, 2)


class EinsumBack(Body):
    """Heads [N, T, 2, 2] back to the width."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 2, 5))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tanh(x).cumsum(1)
        return self.note(rows, torch.einsum("bthk,hkd->btd", rows.unflatten(-1, (2, 2)), self.w)).cumsum(1)


class Scores(Body):
    """One number a token, by a vector."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        scores = self.note(x, self.use(x, self.w).unsqueeze(-1))
        return (torch.sigmoid(scores) * x).cumsum(1)


class Experts(Body):
    """Every token through every expert, mixed by a gate: one input for all the weights, or a copy for each."""

    def __init__(self, use: Callable[[Tensor, Tensor, Tensor], Tensor], copies: int = 1) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(2, WIDTH, 5)), nn.Parameter(torch.randn(2, 1, 5))
        self.gate, self.use, self.copies = nn.Linear(WIDTH, 2), use, copies

    def forward(self, x: Tensor) -> Tensor:
        out = self.use(x.flatten(0, 1), self.w, self.b)  # [E, N T, 5]
        out = out.unflatten(1, x.shape[:2]).permute(1, 2, 0, 3)  # [N, T, E, 5]
        out = self.note(x.repeat(1, 1, self.copies), out.flatten(2)).unflatten(-1, (2, 5))
        return torch.tanh((self.gate(x).softmax(-1).unsqueeze(-1) * out).sum(2)).cumsum(1)


class PerHead(Body):
    """Every head has a weight of its own for its own input: groups."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor], *, transposed: bool = False) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 3, 2) if transposed else torch.randn(2, 2, 3))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.note(x, self.use(x.unflatten(-1, (2, 2)), self.w).flatten(2)).cumsum(1)


class Bilinear(Body):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.form = nn.Bilinear(WIDTH, WIDTH, 5, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        other = torch.tanh(x.flip(1))
        rows = (x.unsqueeze(-1) * other.unsqueeze(-2)).flatten(2)
        return self.note(rows, self.form(x, other)).cumsum(1)


class Layer(Body):
    """A recurrent layer over time, the last step of which is read."""

    def __init__(self, make: Callable[..., nn.Module], **options: Any) -> None:
        super().__init__()
        self.layer = make(WIDTH, 3, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][:, -1]


@dataclass(frozen=True)
class Case:
    """A body, the parameters of the layer looked at, how the weight is its matrix, and its groups.

    `run` is the case whose run, of the same body, has this layer, too.
    """

    make: Callable[[], Body]
    weight: str
    bias: str = ""
    matrix: Callable[[Tensor], Tensor] = lambda w: w.flatten(1)
    groups: int = 1
    told: bool = True
    run: str = ""


def packed(how: Callable[[Tensor], Sequence[Tensor]], **options: Any) -> Case:
    return Case(lambda: Packed(how, **options), "qkv.weight", "qkv.bias" if options.get("bias", True) else "")


def heads_first(w: Tensor) -> Tensor:
    """[..., heads, d_in, d_out] as [..., heads * d_out, d_in]."""
    return w.transpose(-1, -2).flatten(-3, -2)


CASES: dict[str, Case] = {
    "split": packed(lambda p: p.split(WIDTH)),
    "split_with_sizes": packed(lambda p: p.split([WIDTH] * 3)),
    "chunk": packed(lambda p: p.chunk(3)),
    "slices": packed(lambda p: [p[:WIDTH], p[WIDTH : 2 * WIDTH], p[2 * WIDTH :]]),
    "narrow": packed(lambda p: [p.narrow(0, WIDTH * i, WIDTH) for i in range(3)]),
    "viewed": packed(lambda p: p.view(3, WIDTH, *p.shape[1:]).unbind(0)),
    "no_bias": packed(lambda p: p.chunk(3), bias=False),
    "first_rows": Case(FirstRows, "qkv.weight", "qkv.bias"),
    "columns": Case(Columns, "mix.weight"),
    "stacked": Case(Stacked, "w", matrix=lambda w: w.flatten(-3, -2)),
    "einsum_heads": Case(lambda: Einsum((2, WIDTH, 3), "bnd,hdk->bhnk"), "w", matrix=heads_first),
    "einsum_middle": Case(
        lambda: Einsum((WIDTH, 2, 3), "btd,dhk->bthk"), "w", matrix=lambda w: w.movedim(-3, -1).flatten(-3, -2)
    ),
    "einsum_dots": Case(
        lambda: Einsum((WIDTH, 2, 3), "...d,dhk->...hk"), "w", matrix=lambda w: w.movedim(-3, -1).flatten(-3, -2)
    ),
    "einsum_back": Case(EinsumBack, "w", matrix=lambda w: w.flatten(-3, -2).transpose(-1, -2)),
    "einsum_vector": Case(
        lambda: Scores(lambda x, w: torch.einsum("ntd,d->nt", x, w)), "w", matrix=lambda w: w[..., None, :]
    ),
    "matmul_vector": Case(lambda: Scores(lambda x, w: x @ w), "w", matrix=lambda w: w[..., None, :]),
    "experts_einsum": Case(
        lambda: Experts(lambda x, w, b: torch.einsum("nd,edk->enk", x, w) + b), "w", "b", heads_first
    ),
    "experts_matmul": Case(lambda: Experts(lambda x, w, b: x @ w + b), "w", "b", heads_first),
    "experts_bmm": Case(
        lambda: Experts(lambda x, w, b: torch.bmm(x.expand(2, -1, -1), w) + b, copies=2),
        "w",
        "b",
        lambda w: w.transpose(-1, -2),
        2,
    ),
    "experts_baddbmm": Case(
        lambda: Experts(lambda x, w, b: torch.baddbmm(b, x.expand(2, -1, -1), w), copies=2),
        "w",
        "b",
        lambda w: w.transpose(-1, -2),
        2,
    ),
    "per_head_einsum": Case(
        lambda: PerHead(lambda x, w: torch.einsum("bthd,hdk->bthk", x, w)), "w", "", lambda w: w.transpose(-1, -2), 2
    ),
    "per_head_matmul": Case(
        lambda: PerHead(lambda x, w: (x.unsqueeze(-2) @ w).squeeze(-2)), "w", "", lambda w: w.transpose(-1, -2), 2
    ),
    "per_head_from_left": Case(
        lambda: PerHead(lambda x, w: (w @ x.unsqueeze(-1)).squeeze(-1), transposed=True), "w", "", lambda w: w, 2
    ),
    "bilinear": Case(lambda: Bilinear(True), "form.weight", "form.bias", matrix=lambda w: w.flatten(-2)),
    "bilinear_no_bias": Case(lambda: Bilinear(False), "form.weight", matrix=lambda w: w.flatten(-2)),
}
for kind, make in (("rnn", nn.RNN), ("gru", nn.GRU), ("lstm", nn.LSTM)):
    for part in ("ih_l0", "hh_l0", "hh_l0_reverse"):  # cells, and factors in one direction: tests/kinds.py
        CASES[f"{kind}_{part}"] = Case(
            lambda make=make: Layer(make, bidirectional=True),
            f"layer.weight_{part}",
            f"layer.bias_{part}",
            told=False,
            run=f"{kind}_ih_l0",
        )
for weight, bias in (("layer.weight_hh_l0", "layer.bias_hh_l0"), ("layer.weight_hr_l0", "")):
    CASES[f"lstm_projected, {weight}"] = Case(
        lambda: Layer(nn.LSTM, proj_size=2), weight, bias, told=False, run="lstm_projected, layer.weight_hh_l0"
    )
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
TOLD = [name for name, case in CASES.items() if case.told]


class Model(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.embed, self.body = nn.Linear(2, WIDTH), body
        with torch.no_grad():
            width = body(torch.zeros(1, TOKENS, WIDTH)).numel()
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(torch.tanh(self.embed(x)))).flatten(1))


@cache
def problem(name: str) -> tuple[Model, Tensor, Tensor]:
    torch.manual_seed(17)
    model = Model(CASES[name].make()).double().eval()
    return model, torch.randn(EXAMPLES, TOKENS, 2).double(), torch.randint(CLASSES, (EXAMPLES,))


def run_of(name: str, dump: tuple[str, ...] = ("blocks",)) -> Run:
    return _run_of(CASES[name].run or name, dump)


@cache
def _run_of(name: str, dump: tuple[str, ...]) -> Run:
    # no time for steps of the whole network, which are not looked at here
    model, inputs, targets = problem(name)
    options: dict[str, Any] = {"dtype": "float64", "fisher": "exact", "time": 1e-3}
    return curvscope.analyze(model, (inputs, targets), loss="cross_entropy", dump=dump, **options)


def layer_of(name: str, dump: tuple[str, ...] = ("blocks",)) -> Any:
    run, weight = run_of(name, dump), f"body.{CASES[name].weight}"
    rows = {row.parameter: row for row in run.tables["coverage"]}
    assert rows[weight].treatment == "kronecker", rows[weight].reason
    return run.layers[rows[weight].layer]


def as_matrix(case: Case, weight: Tensor, bias: Tensor | None, lead: int) -> Tensor:
    """A weight with `lead` axes before its own as [..., groups, d_out, d_in(+1)]."""
    matrix = case.matrix(weight) if lead or weight.ndim else weight
    if case.groups == 1:
        matrix = matrix.reshape(*weight.shape[:lead], 1, *matrix.shape[-2:])
    if bias is not None:
        matrix = torch.cat([matrix, bias.reshape(*matrix.shape[:-1], 1)], -1)
    return matrix


@cache
def naive(name: str) -> tuple[list[Tensor], Tensor]:
    """The exact block of every group and the gradient [groups, d_out, d_in(+1)]."""
    case = CASES[name]
    model, inputs, targets = problem(name)
    names = [f"body.{key}" for key in (case.weight, case.bias) if key]
    parameters = {key: value.detach() for key, value in model.named_parameters()}

    def outputs(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, {**parameters, **dict(zip(names, values, strict=True))}, (inputs,))

    J = torch.autograd.functional.jacobian(outputs, tuple(parameters[key] for key in names))
    J = as_matrix_of(case, J)  # [N, C, groups, d_out, d_in]
    H = reference.output_hessian(functional.cross_entropy, model(inputs).detach(), targets)
    G = torch.einsum("ncgp,ncd,ndgq->gpq", J.flatten(3), H, J.flatten(3))
    loss = functional.cross_entropy(model(inputs), targets)
    grads = torch.autograd.grad(loss, [dict(model.named_parameters())[key] for key in names])
    return list(G), as_matrix_of(case, tuple(g[None, None] for g in grads))[0, 0]


def as_matrix_of(case: Case, found: Sequence[Tensor]) -> Tensor:
    weight = found[0]
    flat = [each.flatten(0, 1) for each in found]
    matrices = [as_matrix(case, flat[0][i], flat[1][i] if len(flat) > 1 else None, 0) for i in range(flat[0].shape[0])]
    return torch.stack(matrices).unflatten(0, weight.shape[:2])


@pytest.mark.parametrize("dump", [("blocks",), ("blocks", "columns")], ids=["formed", "kept"])
@pytest.mark.parametrize("name", CASES)
def test_exact_block_and_gradient(name: str, dump: tuple[str, ...]) -> None:
    layer = layer_of(name, dump)
    blocks, gradient = naive(name)
    G = torch.block_diag(*blocks)
    assert layer.row.groups == CASES[name].groups
    assert layer.row.bias == bool(CASES[name].bias)
    assert layer.row.parameters == G.shape[0]
    np.testing.assert_allclose(layer.block, G.numpy(), rtol=1e-9, atol=1e-12 * float(G.abs().max()))
    assert layer.attributes["gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-10)


@cache
def naive_factors(name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of both flavours, a group after the other, from the rows that the body itself tells of."""
    case = CASES[name]
    model, inputs, targets = problem(name)
    probe = Probe()
    model.body.__dict__["probe"] = probe
    try:
        output = model(inputs)
    finally:
        model.body.__dict__["probe"] = None
    calls = list({id(call[1]): call for call in probe.calls}.values())
    grads = [
        torch.autograd.grad(output[n, c], [call[1] for call in calls], retain_graph=True)
        for n in range(EXAMPLES)
        for c in range(CLASSES)
    ]
    H = reference.output_hessian(functional.cross_entropy, output.detach(), targets)
    shape = as_matrix_of(case, [dict(model.named_parameters())[f"body.{case.weight}"][None, None]])[0, 0].shape
    d_out, d_in = shape[0] * shape[1], shape[2] * case.groups
    a_parts, J_parts = [], []
    for index, (rows, _, out, into) in enumerate(calls):
        J = torch.stack([grad[index] for grad in grads]).unflatten(0, (EXAMPLES, CLASSES))
        J = torch.stack([J[n, :, n] for n in range(EXAMPLES)])  # [N, C, R, d]
        wide_J = J.new_zeros(*J.shape[:-1], d_out)
        wide_J[..., list(out if out is not None else range(d_out))] = J
        wide_a = rows.new_zeros(*rows.shape[:-1], d_in)
        wide_a[..., list(into if into is not None else range(d_in))] = rows.detach()
        a_parts.append(wide_a)
        J_parts.append(wide_J)
    a, J = torch.cat(a_parts, 1), torch.cat(J_parts, 2)
    a, J = a.unflatten(-1, (case.groups, -1)), J.unflatten(-1, (case.groups, -1))
    if case.bias:
        a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {"expand": ([], []), "reduce": ([], [])}
    for group in range(case.groups):
        io = reference.LayerIO(a[:, :, group], J[:, :, :, group])
        for flavour, (A, B) in reference.factors(io, H).items():
            found[flavour][0].append(A)
            found[flavour][1].append(B)
    return {flavour: (torch.stack(As), torch.stack(Bs)) for flavour, (As, Bs) in found.items()}


@pytest.mark.parametrize("name", TOLD)
def test_factors(name: str) -> None:
    layer = layer_of(name)
    for flavour, (A, B) in naive_factors(name).items():
        for got, want in ((layer.factors[flavour].A, A), (layer.factors[flavour].B, B)):
            want = want if CASES[name].groups > 1 else want[0]
            np.testing.assert_allclose(got, want.numpy(), rtol=1e-9, atol=1e-12 * float(want.abs().max()))
