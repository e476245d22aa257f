"""Embeddings, and weights used in several roles, against Jacobians of the whole model and one-hot rows.

The oracle: every use of the weight is shifted by a tensor of zeros, whose Jacobian is that of the use's output; its
inputs are one-hot rows or what goes into the linear layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import curvscope
from curvscope.curvature.block import Block
from curvscope.extract.collector import Columns, Extract
from curvscope.measure import layers, parts, spectrum
from curvscope.measure.draws import singly
from curvscope.measure.terms import draw_products, terms
from curvscope.present.export import export
from curvscope.records import Layer
from curvscope.run import Run
from tests import reference
from tests.many import cut

EXAMPLES, TIME, WORDS, WIDTH = 3, 4, 6, 3
TOLERANCE = 1e-9


class Watched(nn.Module):
    """A model whose uses of the weight can be shifted and seen."""

    shifts: dict[str, Tensor] | None = None
    seen: dict[str, Tensor]

    def use(self, name: str, rows: Tensor, output: Tensor) -> Tensor:
        """The output of one use, of input rows [N, R, d_in]."""
        if self.shifts is None:
            return output
        self.seen[name] = rows.detach()
        return output + self.shifts[name].view(output.shape) if name in self.shifts else output


def onehot(index: Tensor, table: nn.Embedding) -> Tensor:
    rows = functional.one_hot(index, table.num_embeddings).double()
    return rows if table.padding_idx is None else rows * (index != table.padding_idx).unsqueeze(-1)


class Bag(Watched):
    """Tokens, mixed and pooled, then a head."""

    def __init__(self, padding: int | None = None, words: int = WORDS) -> None:
        super().__init__()
        self.table = nn.Embedding(words, WIDTH, padding_idx=padding)
        with torch.no_grad():
            self.table.weight.normal_()
        self.mid, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.use("embedding", onehot(x, self.table), self.table(x))
        return self.head(torch.tanh(self.mid(h).cumsum(1)).mean(1))


class OneToken(Watched):
    """One token an example, straight into what mixes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.use("embedding", onehot(x, self.table), self.table(x[:, 0])[:, None])[:, 0]))


class Twice(Bag):
    """The same table looked up for two sequences: their rows are further positions."""

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([x, x[:, :2].flip(1)], 1)
        looked = torch.cat([self.table(both[:, :TIME]), self.table(both[:, TIME:])], 1)
        h = self.use("embedding", onehot(both, self.table), looked)
        return self.head(torch.tanh(self.mid(h).cumsum(1)).mean(1))


class Attention(nn.Module):
    """Causal self-attention of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        scores = self.q(h) @ self.k(h).transpose(1, 2)
        mask = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1)
        return h + torch.softmax(scores.masked_fill(mask, float("-inf")), -1) @ self.v(h)


class LanguageModel(Watched):
    """A transformer whose head is its table, or another weight."""

    def __init__(self, tied: bool, padding: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(WORDS, WIDTH, padding_idx=padding), nn.Embedding(TIME, WIDTH)
        with torch.no_grad():
            self.table.weight.normal_()
        self.mix, self.norm = Attention(), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.use("embedding", onehot(x, self.table), self.table(x)) + self.places(torch.arange(x.shape[1]))
        h = self.norm(self.mix(h))
        return self.use("head", h, self.head(h))


class Autoencoder(Watched):
    """W down and W^T up again."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.down, self.mid = nn.Linear(5, WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH)
        self.up_bias = nn.Parameter(torch.randn(5)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.mid(torch.tanh(self.use("linear", x[:, None], self.down(x)[:, None])[:, 0])))
        up = self.use("transposed", h[:, None], (h @ self.down.weight)[:, None])[:, 0]
        return up if self.up_bias is None else up + self.up_bias


class HeadFirst(Watched):
    """The weight is a linear layer's before rows of it are looked up: the layer has that orientation."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        scores = self.use("head", x, functional.linear(x, self.table.weight))
        h = self.use("embedding", onehot(index, self.table), self.table(index))
        return torch.tanh(scores).sum(1)[:, :3] + torch.tanh(h.cumsum(1)).sum(1)


def causal(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def words(*shape: int, top: int = WORDS) -> Tensor:
    return torch.randint(top, shape)


@dataclass(frozen=True)
class Case:
    """A model with its batch, the layer's name and weight, and its roles (name -> uses the transpose)."""

    build: Callable[[], tuple[nn.Module, Any, Any]]
    layer: str = "table"
    roles: dict[str, bool] | None = None
    loss: Any = "cross_entropy"
    loss_fn: Callable[[Tensor, Any], Tensor] = functional.cross_entropy
    transposed: bool = True
    flavoured: bool = True

    @property
    def weight(self) -> str:
        return f"{self.layer}.weight"


def bag(**options: Any) -> tuple[nn.Module, Any, Any]:
    x = words(EXAMPLES, TIME)
    x[0] = x[0, 0]  # the same token four times
    x[1, 2:] = 0
    return Bag(**options), x, words(EXAMPLES, top=3)


def language_model(*args: Any, **options: Any) -> tuple[nn.Module, Any, Any]:
    x = words(EXAMPLES, TIME)
    x[1, 3] = 0
    return LanguageModel(*args, **options), x, x


def autoencoder(bias: bool) -> tuple[nn.Module, Any, Any]:
    x = torch.randn(EXAMPLES, 5)
    return Autoencoder(bias), x, x.double()


def head_first() -> tuple[nn.Module, Any, Any]:
    return HeadFirst(), (torch.randn(EXAMPLES, 2, WIDTH), words(EXAMPLES, 2)), words(EXAMPLES, top=3)


LM: dict[str, Any] = {"loss": "causal_lm", "loss_fn": causal}
TIED = {"embedding": False, "head": True}
AUTO: dict[str, Any] = {
    "layer": "down",
    "roles": {"linear": False, "transposed": True},
    "loss": "mse",
    "loss_fn": functional.mse_loss,
    "transposed": False,
    "flavoured": False,
}
CASES: dict[str, Case] = {
    "alone": Case(bag),
    "padding": Case(lambda: bag(padding=0)),
    "large_vocabulary": Case(lambda: bag(words=50)),
    "one_token": Case(lambda: (OneToken(), words(5, 1), words(5, top=3)), flavoured=False),
    "called_twice": Case(lambda: (Twice(), words(EXAMPLES, TIME), words(EXAMPLES, top=3))),
    "language_model": Case(lambda: language_model(tied=False), **LM),
    "tied": Case(lambda: language_model(tied=True), roles=TIED, **LM),
    "tied_padding": Case(lambda: language_model(tied=True, padding=0), roles=TIED, **LM),
    "tied_bias": Case(lambda: language_model(tied=True, bias=True), roles=TIED, **LM),
    "autoencoder": Case(lambda: autoencoder(False), **AUTO),
    "autoencoder_bias": Case(lambda: autoencoder(True), **AUTO),
    "head_first": Case(head_first, roles={"head": False, "embedding": True}, transposed=False),
}


@cache
def problem(name: str) -> tuple[Watched, Any, Any]:
    torch.manual_seed(11)
    model, inputs, targets = CASES[name].build()
    assert isinstance(model, Watched)
    inputs = tuple(t.double() if t.is_floating_point() else t for t in inputs) if isinstance(inputs, tuple) else inputs
    return model.double().eval(), inputs.double() if name.startswith("auto") else inputs, targets


@cache
def run_of(name: str, dump: tuple[str, ...] = ("columns", "blocks"), **options: Any) -> Run:
    model, inputs, targets = problem(name)
    given = {"fisher": "exact", "measure": ("spectral", "kron_best")} | options
    return curvscope.analyze(model, (inputs, targets), loss=CASES[name].loss, dtype="float64", dump=dump, **given)


@dataclass(frozen=True)
class Want:
    """What the oracle knows of a case; A of embeddings over the whole vocabulary."""

    G: Tensor
    gradient: Tensor
    factors: dict[str, dict[str, tuple[Tensor, Tensor]]]
    """role -> flavour -> (A, B)"""

    def approximation(self, flavour: str, roles: dict[str, bool]) -> Tensor:
        return sum(
            (
                torch.kron(A, B) if roles.get(role, False) else torch.kron(B, A)
                for role, factors in self.factors.items()
                for A, B in (factors[flavour],)
            ),
            torch.zeros(()),
        )


@cache
def want(name: str) -> Want:
    case = CASES[name]
    model, inputs, targets = problem(name)
    H = reference.output_hessian(case.loss_fn, reference.call(model, inputs), targets)
    G = reference.parameter_block(model, inputs, targets, case.loss_fn, case.weight, transposed=case.transposed, H=H)
    gradient = reference.gradient(model, inputs, targets, case.loss_fn, case.weight, transposed=case.transposed)
    model = copy.deepcopy(model).requires_grad_(False)
    model.shifts, model.seen = {}, {}
    reference.call(model, inputs)
    rows = dict(model.seen)
    shape = dict(model.named_parameters())[case.weight].shape
    factors = {}
    for role, a in rows.items():
        size = next(size for size in shape if size != a.shape[-1])
        zeros = torch.zeros(*a.shape[:2], size, dtype=torch.float64)

        def shifted(shift: Tensor, role: str = role) -> Tensor:
            model.shifts = {role: shift}
            return reference.call(model, inputs).flatten(1)

        J = torch.func.jacrev(shifted)(zeros)  # [N, D, N, R, size]
        J = torch.stack([J[n, :, n] for n in range(J.shape[0])])
        # a padding token is no position
        mask = a.abs().sum(-1) > 0 if role == "embedding" else None
        factors[role] = reference.factors(reference.LayerIO(a, J), H, mask)
    wanted = CASES[name].roles or {"embedding": False}
    return Want(G.detach(), gradient.detach(), {role: factors[role] for role in wanted})


def layer_of(name: str, **options: Any) -> Layer:
    return run_of(name, **options).layers[CASES[name].layer]


def compact(name: str, G: Tensor) -> Tensor:
    """[P, P] over the vocabulary to [U d, U d] over the tokens; what is left out has to be zero."""
    layer = layer_of(name)
    if CASES[name].roles is not None:
        return G
    tokens = torch.as_tensor(layer.tokens)
    V, d = layer.row.d_in, layer.row.d_out
    kept = (torch.arange(d)[:, None] * V + tokens[None]).flatten()
    rest = torch.ones(V * d, dtype=torch.bool)
    rest[kept] = False
    assert float(G[rest].abs().sum()) == 0.0
    return G[kept][:, kept]


def close(got: Any, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(got), wanted.numpy(), rtol=0, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_factors(name: str) -> None:
    layer, oracle = layer_of(name), want(name)
    roles = CASES[name].roles
    keys = [f"{flavour}/{role}" for flavour in ("expand", "reduce") for role in roles or ()]
    assert list(layer.factors) == (keys or ["expand", "reduce"])
    for key, got in layer.factors.items():
        flavour, _, role = key.partition("/")
        assert (got.flavour, got.role) == (flavour, role)
        A, B = oracle.factors[role or "embedding"][flavour]
        close(got.B, B)
        if (role or "embedding") != "embedding":
            close(got.A, A)
        elif flavour == "expand":
            assert got.A.shape == (WORDS if name != "large_vocabulary" else 50,)
            close(np.diag(got.A), A)
        else:
            assert layer.tokens is not None
            close(got.A, A[layer.tokens][:, layer.tokens])
            assert float(A.trace()) == pytest.approx(float(np.trace(got.A)))


@pytest.mark.parametrize("name", CASES)
def test_tokens(name: str) -> None:
    model, inputs, _ = problem(name)
    layer = layer_of(name)
    if name.startswith("auto"):
        assert layer.tokens is None
        return
    index = inputs[1] if isinstance(inputs, tuple) else inputs
    seen = {int(token) for token in index.flatten()} - {getattr(model.table, "padding_idx", None)}  # type: ignore[union-attr]
    assert layer.tokens is not None
    assert layer.tokens.tolist() == sorted(seen)


@pytest.mark.parametrize("dump", [("blocks",), ("columns", "blocks")], ids=["formed", "columns"])
@pytest.mark.parametrize("name", CASES)
def test_block_and_gradient(name: str, dump: tuple[str, ...]) -> None:
    layer, oracle = layer_of(name, dump=dump), want(name)
    G = compact(name, oracle.G)
    close(layer.block, G)
    if "columns" in dump:
        flat = layer.columns().reshape(layer.row.columns, -1)
        close(flat.T @ flat, G)
    assert layer.attributes["gradient_norm"] == pytest.approx(float(oracle.gradient.norm()), rel=TOLERANCE)
    assert layer.row.parameters == oracle.G.shape[0]


@pytest.mark.parametrize("dump", [("blocks",), ("columns", "blocks")], ids=["formed", "columns"])
@pytest.mark.parametrize("name", CASES)
def test_errors_and_spectra(name: str, dump: tuple[str, ...]) -> None:
    """All approximations against dense matrices; EKFAC of expand in the tokens' own basis."""
    case, layer, oracle = CASES[name], layer_of(name, dump=dump), want(name)
    G = compact(name, oracle.G)
    d_out = layer.row.d_out
    dense = {f"kfac_{flavour}": oracle.approximation(flavour, case.roles or {}) for flavour in ("expand", "reduce")}
    dense = {key: compact(name, M) for key, M in dense.items()}
    dense |= {"diag": torch.diag(torch.diag(G)), "kron_best": reference.kron_best(G, d_out, G.shape[0] // d_out)}
    if case.roles is None:
        basis = torch.linalg.eigh(oracle.factors["embedding"]["expand"][1]).eigenvectors.contiguous()
        dense["ekfac_expand"] = reference.ekfac(G, torch.eye(G.shape[0] // d_out, dtype=G.dtype), basis)
    else:
        for flavour in ("expand", "reduce"):
            assert layer.errors[f"ekfac_{flavour}"].status == "not_assessed"
            assert "two roles" in layer.errors[f"ekfac_{flavour}"].reason
    for approximation, M in dense.items():
        row = layer.errors[approximation]
        assert row.status == "ok", row
        for key, value in reference.errors(G, M).items():
            if approximation == "kron_best" and key != "rel_frobenius":
                continue
            tolerance = 1e-7 if approximation == "kron_best" else TOLERANCE
            assert getattr(row, key) == pytest.approx(value, rel=tolerance, abs=1e-9), (approximation, key)
    for matrix in ("ggn", "kfac_expand", "kfac_reduce", "diag"):
        eigenvalues = torch.linalg.eigvalsh(dense.get(matrix, G)).flip(0)
        values = torch.as_tensor(layer.spectrum[matrix].copy())
        close(values, eigenvalues[: len(values)])
        numbers = reference.spectrum_numbers(eigenvalues, max(G.shape[0], layer.row.columns))
        for key in ("trace", "lambda_max", "stable_rank"):
            assert getattr(layer.spectra[matrix], key) == pytest.approx(numbers[key], rel=1e-8), (matrix, key)
    if not case.flavoured:
        assert layer.row.better_flavour == "same"


@pytest.mark.parametrize("name", CASES)
def test_coverage_and_whole_gradient(name: str) -> None:
    case, run = CASES[name], run_of(name)
    model, inputs, targets = problem(name)
    treatment = {row.parameter: row.treatment for row in run.tables["coverage"]}
    assert treatment[case.weight] == "kronecker"
    if case.roles is not None:
        # a weight of two roles has no bias of its own
        assert all(treatment[key] == "exact_only" for key in ("down.bias", "up_bias", "head.bias") if key in treatment)
    loss = case.loss_fn(reference.call(model, inputs), targets)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    norm = sum(float(g.square().sum()) for g in grads) ** 0.5
    assert run.model.gradient_norm == pytest.approx(norm, rel=1e-12)


class Branching(nn.Module):
    """Data-dependent control flow, which export refuses."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return torch.zeros(1)
        return self.inner(x)


@pytest.mark.parametrize("name", ["alone", "padding", "language_model", "tied", "tied_padding", "tied_bias"])
def test_eager_fallback(name: str) -> None:
    model, inputs, targets = problem(name)
    options: dict[str, Any] = {"loss": CASES[name].loss, "dtype": "float64", "fisher": "exact", "dump": ("blocks",)}
    eager = curvscope.analyze(Branching(model), (inputs, targets), **options)
    assert eager.model.graph.startswith("eager")
    got, exported = eager.layers["inner.table"], layer_of(name)
    np.testing.assert_allclose(got.block, exported.block, rtol=1e-9, atol=1e-13)
    assert list(got.factors) == list(exported.factors)
    for key, factors in exported.factors.items():
        np.testing.assert_allclose(got.factors[key].A, factors.A, rtol=1e-9, atol=1e-13)
        np.testing.assert_allclose(got.factors[key].B, factors.B, rtol=1e-9, atol=1e-13)
    assert eager.model.gradient_norm == pytest.approx(run_of(name).model.gradient_norm, rel=1e-12)
    rows = {row.parameter: row for row in eager.tables["coverage"]}
    if "inner.places.weight" in rows:
        assert rows["inner.places.weight"].treatment == "uncovered"
        assert "belong to no example" in rows["inner.places.weight"].reason


@pytest.mark.parametrize("name", ["padding", "tied_padding", "head_first"])
def test_file_keeps_vectors_tokens_and_roles(name: str, tmp_path: Path) -> None:
    run = run_of(name, dump=("columns", "blocks", "spectra"))
    before = run.layers[CASES[name].layer]
    after = curvscope.open(run.save(tmp_path / "run.h5")).layers[CASES[name].layer]
    assert set(after.factors) == set(before.factors)
    for key, factors in before.factors.items():
        assert np.array_equal(after.factors[key].A, factors.A)
        assert np.array_equal(after.factors[key].B, factors.B)
        assert after.factors[key].role == factors.role
    assert np.array_equal(after.tokens, before.tokens)
    assert np.array_equal(after.columns(), before.columns())
    assert np.array_equal(after.block, before.block)
    assert set(after.eigenvectors) == set(before.eigenvectors)
    assert dict(after.attributes).items() <= dict(before.attributes).items()


PROBED = ("padding", "tied_padding", "autoencoder", "head_first")


@pytest.mark.parametrize("name", PROBED)
def test_probes_estimate_the_exact_numbers(name: str) -> None:
    """Every estimate lies within its error bar, for one role and for the sum of two."""
    exact, probed = layer_of(name), layer_of(name, fisher="probe", samples=24)
    for key, factors in exact.factors.items():
        np.testing.assert_allclose(probed.factors[key].A, factors.A, rtol=1e-12, atol=1e-15)
        assert np.linalg.norm(probed.factors[key].B - factors.B) < 0.7 * np.linalg.norm(factors.B)
    for approximation in ("kfac_expand", "kfac_reduce", "diag"):
        got, wanted = probed.errors[approximation], exact.errors[approximation]
        assert got.status == "estimated", got
        for key in ("rel_frobenius", "cosine", "trace_ratio"):
            gap = abs(getattr(got, key) - getattr(wanted, key))
            assert gap <= 4 * getattr(got, f"{key}_stderr") + 1e-12, (approximation, key)


@pytest.mark.parametrize("name", PROBED)
def test_products_of_single_draws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """<G_i, M_j> and <M_i, M_j> of every pair of draws against dense matrices, whichever way a role uses the weight."""
    caught: list[Extract] = []
    measure = layers.measure_layer

    def catch(extract: Extract, *args: Any, **options: Any) -> Layer:
        caught.append(extract)
        return measure(extract, *args, **options)

    monkeypatch.setattr(layers, "measure_layer", catch)
    model, inputs, targets = problem(name)
    options: dict[str, Any] = {"loss": CASES[name].loss, "dtype": "float64", "fisher": "probe", "samples": 4}
    curvscope.analyze(model, (inputs, targets), **options)
    (extract,) = [one for one in caught if one.spec.name == CASES[name].layer]
    assert isinstance(extract.columns, Columns)
    block = Block(extract.columns, extract.spec.d_out, extract.width)
    draws = list(singly(block))
    for given in terms(extract).values():
        G = [4 * draw.dense() for draw in draws]
        M = []
        for k in range(4):
            each = [(term, term.draws[k] * 4) for term in given if term.draws is not None]
            M.append(sum(torch.kron(t.A, B) if t.flipped else torch.kron(B, t.A) for t, B in each))
        GM, MM, trace = draw_products(given, block)
        close(GM, torch.tensor([[(g * m).sum() for m in M] for g in G]))
        close(MM, torch.tensor([[(n * m).sum() for m in M] for n in M]))
        close(trace, torch.stack([m.trace() for m in M]))


def test_a_large_sum_of_products_is_not_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace, largest eigenvalue and stable rank are those of the matrix; the rest is not assessed."""
    formed = layer_of("tied")
    monkeypatch.setattr(spectrum, "FORMED_PARAMETERS", 1)
    model, inputs, targets = problem("tied")
    run = curvscope.analyze(model, (inputs, targets), loss="causal_lm", dtype="float64", fisher="exact")
    for name in ("kfac_expand", "kfac_reduce"):
        got, wanted = run.layers["table"].spectra[name], formed.spectra[name]
        for key in ("trace", "lambda_max", "stable_rank"):
            assert getattr(got, key) == pytest.approx(getattr(wanted, key), rel=1e-8), (name, key)
        assert np.isnan(got.condition)
        assert "closed form" in got.reason
        assert name not in run.layers["table"].spectrum


class OfNoExample(nn.Module):
    """A table whose index is an input of its own, the same for all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return self.head(torch.tanh(x + self.table(index)).mean(1))


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: Branching2(model)], ids=["exported", "eager"])
def test_rows_of_no_example_are_given_up(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(3)
    model = wrap(OfNoExample()).double()
    inputs, targets = (torch.randn(5, TIME, WIDTH).double(), words(1, TIME)), words(5, top=3)
    run = curvscope.analyze(model, (inputs, targets), loss="cross_entropy", dtype="float64", fisher="exact")
    (row,) = [row for row in run.tables["coverage"] if row.parameter.endswith("table.weight")]
    assert row.treatment == "uncovered"
    assert "belong to no example" in row.reason
    loss = functional.cross_entropy(model(*inputs), targets)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert run.model.gradient_norm == pytest.approx(sum(float(g.square().sum()) for g in grads) ** 0.5, rel=1e-12)


class Branching2(Branching):
    """The same for two inputs."""

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return torch.zeros(1)
        return self.inner(x, index)


def test_only_padding() -> None:
    """A batch of padding tokens alone has no curvature and says so."""
    model, inputs, targets = bag(padding=0)
    batch = torch.zeros_like(inputs), targets
    layer = curvscope.analyze(model, batch, loss="cross_entropy", fisher="exact").layers["table"]
    assert layer.errors["kfac_expand"].status == "not_assessed"
    assert "zero" in layer.errors["kfac_expand"].reason
    assert not layer.factors["expand"].A.any()


@pytest.mark.parametrize("name", ["padding", "tied_padding"])
def test_pages_and_exports(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, layer = run_of(name), layer_of(name)
    run.show("table")
    page = capsys.readouterr().out
    assert f"{len(layer.tokens)} of {WORDS} occur" in page
    assert ("embedding and head" in page) == (name == "tied_padding")
    assert f'factors["{next(iter(layer.factors))}"]' in page
    export(run, tmp_path / "run.npz", "npz")
    kept = np.load(tmp_path / "run.npz")
    for key, factors in layer.factors.items():
        assert np.array_equal(kept[f"table/factors/{key}/A"], factors.A)
    assert np.array_equal(kept["table/tokens"], layer.tokens)
    for to in ("safetensors", "csv", "json"):
        export(run, tmp_path / f"run.{to}", to)


class Rescaled(nn.Module):
    """max_norm rewrites the rows as they are looked up: what is trained is another matrix than what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, WIDTH, max_norm=1.0), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x)).mean(1))


def test_rescaled_rows() -> None:
    """The block is that of the rows as the forward pass leaves them, and the user's own rows stay."""
    torch.manual_seed(0)
    model, (inputs, targets) = Rescaled().double().eval(), (words(5, TIME), words(5, top=3))
    before = model.table.weight.detach().clone()
    run = curvscope.analyze(
        model, (inputs, targets), loss="cross_entropy", fisher="exact", dtype="float64", dump=("blocks",)
    )
    (row,) = [row for row in run.tables["coverage"] if row.parameter == "table.weight"]
    assert row.treatment == "kronecker"
    assert torch.equal(model.table.weight, before)
    output = model(inputs)  # rescales the looked-up rows in place
    assert not torch.equal(model.table.weight, before)
    J = torch.stack([torch.autograd.grad(o, model.table.weight, retain_graph=True)[0] for o in output.flatten()])
    J = J[:, torch.as_tensor(run.layers["table"].tokens)].transpose(1, 2).flatten(1).unflatten(0, output.shape)
    H = reference.output_hessian(nn.functional.cross_entropy, output.detach(), targets)
    G = torch.einsum("ncp,ncd,ndq->pq", J, H, J)
    np.testing.assert_allclose(run.layers["table"].block, G.numpy(), rtol=1e-9, atol=1e-12 * float(G.abs().max()))


@pytest.mark.parametrize("dump", [("blocks",), ("columns", "blocks")], ids=["formed", "columns"])
@pytest.mark.parametrize("name", ["padding", "large_vocabulary", "language_model", "tied_padding"])
def test_many_batches(name: str, dump: tuple[str, ...]) -> None:
    """Batches with other tokens each give what their concatenation does."""
    model, inputs, targets = problem(name)
    pairs = cut((inputs, targets), [1, 2])
    options: dict[str, Any] = {"loss": CASES[name].loss, "dtype": "float64", "fisher": "exact", "dump": dump}
    whole, joined = run_of(name, dump), curvscope.analyze(model, lambda: iter(pairs), **options)
    one, other = whole.layers["table"], joined.layers["table"]
    assert other.tokens is not None
    assert np.array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(other.block, one.block, rtol=1e-9, atol=1e-12 * np.abs(one.block).max())
    for key, factors in one.factors.items():
        np.testing.assert_allclose(other.factors[key].A, factors.A, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(other.factors[key].B, factors.B, rtol=1e-10, atol=1e-14)
    assert other.row.positions == pytest.approx(one.row.positions)
    for approximation in ("kfac_expand", "kfac_reduce", "diag"):
        assert other.errors[approximation].rel_frobenius == pytest.approx(one.errors[approximation].rel_frobenius)
    assert joined.model.gradient_norm == pytest.approx(whole.model.gradient_norm, rel=1e-12)


class Atoms(nn.Module):
    """Kinds of atoms looked up, summed over the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mid, self.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, atoms: Tensor, batch: Tensor) -> Tensor:
        h = torch.tanh(self.mid(self.table(atoms)))
        pooled = h.new_zeros(3, WIDTH).index_add(0, batch, h)
        return self.head(torch.tanh(pooled))


def test_rows_of_graphs() -> None:
    """Graphs of other sizes: an example's rows are its atoms, the mean of their one-hot rows is over these."""
    torch.manual_seed(2)
    model = Atoms().double()
    batch = torch.tensor([0, 0, 0, 1, 2, 2])
    atoms, targets = torch.tensor([4, 4, 7, 2, 0, 7]), words(3, top=3)
    run = curvscope.analyze(
        model,
        ({"atoms": atoms, "batch": batch}, targets),
        loss="cross_entropy",
        example_index="batch",
        dtype="float64",
        fisher="exact",
        dump=("blocks",),
    )
    layer = run.layers["table"]
    assert layer.tokens is not None
    assert layer.tokens.tolist() == [0, 2, 4, 7]
    share = np.zeros(9)
    share[[0, 2, 4, 7]] = [1 / 6, 1 / 6, 2 / 6, 2 / 6]
    np.testing.assert_allclose(layer.factors["expand"].A, share)
    means = np.array([[0, 0, 2 / 3, 1 / 3], [0, 1, 0, 0], [1 / 2, 0, 0, 1 / 2]])
    np.testing.assert_allclose(layer.factors["reduce"].A, means.T @ means / 3)
    inputs = {"atoms": atoms, "batch": batch}
    G = reference.parameter_block(model, inputs, targets, functional.cross_entropy, "table.weight", transposed=True)
    kept = (np.arange(WIDTH)[:, None] * 9 + layer.tokens[None]).flatten()
    close(layer.block, G.detach()[kept][:, kept])
    assert layer.row.positions == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["large_vocabulary", "tied"])
def test_damped_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against dense solves over the whole vocabulary, of which weight decay moves what does not occur."""
    keepers: list[parts.Keeper] = []
    keep = parts.Keeper.keep

    def kept(self: parts.Keeper, *args: Any) -> None:
        keepers.append(self)
        keep(self, *args)

    monkeypatch.setattr(parts.Keeper, "keep", kept)
    model, inputs, targets = problem(name)
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.3)
    options: dict[str, Any] = {"loss": CASES[name].loss, "dtype": "float64", "fisher": "exact"}
    curvscope.analyze(model, (inputs, targets), optimizer=optimizer, measure=("steps",), **options)
    part, oracle = keepers[0].parts["table"], want(name)
    R = oracle.gradient + 0.3 * model.table.weight.detach().T  # type: ignore[operator, union-attr]
    lam = keepers[0].dampings[len(keepers[0].dampings) // 2]
    eye = torch.eye(R.numel(), dtype=R.dtype)

    def solved(M: Tensor) -> Tensor:
        return -torch.linalg.solve(M + lam * eye, R.flatten()).view(R.shape)

    close(part.step("ggn", "eigenbasis", lam), solved(oracle.G))
    if name == "tied":
        close(part.step("kfac_expand", "eigenbasis", lam), solved(oracle.G))
        assert "exact block" in part.notes[0]
        return
    for flavour, (A, B) in oracle.factors["embedding"].items():
        close(part.step(f"kfac_{flavour}", "eigenbasis", lam), solved(torch.kron(B, A)))
        pi = float((A.trace() / A.shape[0] / (B.trace() / B.shape[0])) ** 0.5)
        of_A = A + pi * lam**0.5 * torch.eye(A.shape[0], dtype=A.dtype)
        of_B = B + lam**0.5 / pi * torch.eye(B.shape[0], dtype=A.dtype)
        step = -torch.linalg.solve(of_B, R) @ torch.linalg.inv(of_A)
        close(part.step(f"kfac_{flavour}", "factored", lam), step)
    basis = torch.linalg.eigh(oracle.factors["embedding"]["expand"][1]).eigenvectors.contiguous()
    M = reference.ekfac(oracle.G, torch.eye(R.shape[1], dtype=R.dtype), basis)
    close(part.step("ekfac_expand", "eigenbasis", lam), solved(M))


def test_damping_of_one_layer() -> None:
    """Factored damping balances A over the whole vocabulary: the angle to the exact step against dense solves."""
    layer, oracle = layer_of("large_vocabulary"), want("large_vocabulary")
    R, seen = oracle.gradient, 0
    for row in layer.damping:
        if row.approximation != "kfac_expand" or row.form != "factored" or np.isnan(row.angle_degrees):
            continue
        if row.relative < 1e-3:
            continue  # below, the dense solves lose their digits
        A, B = oracle.factors["embedding"]["expand"]
        pi = float((A.trace() / A.shape[0] / (B.trace() / B.shape[0])) ** 0.5)
        of_A = A + pi * row.damping**0.5 * torch.eye(A.shape[0], dtype=A.dtype)
        of_B = B + row.damping**0.5 / pi * torch.eye(B.shape[0], dtype=A.dtype)
        step = torch.linalg.solve(of_B, R) @ torch.linalg.inv(of_A)
        exact = torch.linalg.solve(oracle.G + row.damping * torch.eye(R.numel(), dtype=R.dtype), R.flatten())
        cosine = float(step.flatten() @ exact / (step.norm() * exact.norm()))
        assert row.angle_degrees == pytest.approx(np.degrees(np.arccos(cosine)), abs=1e-6)
        assert row.length_ratio == pytest.approx(float(step.norm() / exact.norm()), rel=1e-8)
        seen += 1
    assert seen >= 4
