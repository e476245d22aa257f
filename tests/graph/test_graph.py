"""The graph: sites, names, coverage, the eager fallback, and other batches through the same graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.errors import LayoutError, ModelError, UsageError
from curvscope.graph.export import export_model
from curvscope.graph.functional import build
from curvscope.graph.layout import Layout, candidates
from curvscope.load.problem import Inputs
from tests import models, reference


class Branching(nn.Module):
    """Any model behind data-dependent control flow, which export refuses."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return torch.zeros(1)
        return self.inner(x)


class InPlace(nn.Module):
    """In-place operations right on what linear modules return."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).add_(1)
        h += self.b(torch.tanh(h))
        return self.head(h.mul_(2).relu_())


class Everything(nn.Module):
    """Parameters of every treatment."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(4))
        self.first = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.grouped = nn.Conv1d(6, 6, 1, groups=2)
        self.table = nn.Embedding(3, 6)
        self.tied = nn.Linear(6, 3, bias=False)
        self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.frozen = nn.Linear(6, 6)
        self.unused = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.tied.weight = self.table.weight

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.first(x + self.shift)))
        h = h + self.grouped(h.unsqueeze(-1)).squeeze(-1) + self.table(index)
        return self.tied(self.frozen(torch.tanh(self.normed(h))))


MODELS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "mlp": (lambda: models.mlp(4, 5, 3), (6, 4)),
    "in_place": (InPlace, (6, 4)),
    "residual": (models.ResidualCNN, (4, 2, 8, 8)),
    "called_twice": (models.SharedTwice, (6, 4)),
    "transposed_groups": (
        lambda: nn.Sequential(
            nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(54, 3)
        ),
        (4, 4, 4),
    ),
    "attention": (lambda: models.Pooled(models.PlainAttention(3), nn.Linear(3, 3)), (4, 3, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_eager_fallback_agrees_with_export(name: str) -> None:
    factory, shape = MODELS[name]
    torch.manual_seed(0)
    model = factory()
    batch = (torch.randn(shape), torch.randint(3, shape[:1]))
    options: dict[str, Any] = {"loss": "cross_entropy", "fisher": "exact", "dtype": "float64"}
    exported = curvscope.analyze(model, batch, **options)
    eager = curvscope.analyze(Branching(model), batch, **options)
    assert exported.model.graph == "exported"
    assert eager.model.graph.startswith("eager modules")
    assert any("refused" in note for note in eager.notes)
    assert [f"inner.{name}" for name in exported.layers] == list(eager.layers)
    for left, right in zip(exported.layers.values(), eager.layers.values(), strict=True):
        for approximation, row in left.errors.items():
            if not row.reason:
                assert right.errors[approximation].rel_frobenius == pytest.approx(row.rel_frobenius, rel=1e-9)
    assert eager.model.gradient_norm == pytest.approx(exported.model.gradient_norm, rel=1e-12)


def test_every_parameter_is_accounted_for() -> None:
    torch.manual_seed(0)
    model = Everything()
    batch = ((torch.randn(6, 4), torch.randint(3, (6,))), torch.randint(3, (6,)))
    run = curvscope.analyze(model, batch, loss="cross_entropy")
    rows = {row.parameter: row for row in run.tables["coverage"]}
    assert set(rows) == {name for name, _ in model.named_parameters()}
    assert sum(row.count for row in rows.values()) == sum(p.numel() for p in model.parameters())
    want = {
        "first.weight": ("kronecker", ""),
        "first.bias": ("kronecker", ""),
        "shift": ("exact_only", ""),
        "norm.weight": ("exact_only", ""),
        "grouped.weight": ("kronecker", ""),
        "table.weight": ("kronecker", ""),
        "frozen.weight": ("frozen", "does not require a gradient"),
        "unused.weight": ("uncovered", "does not reach it"),
    }
    for name, (treatment, reason) in want.items():
        assert rows[name].treatment == treatment, name
        assert reason in rows[name].reason, (name, rows[name].reason)
    normed = [row for name, row in rows.items() if name.startswith("normed.parametrizations")]
    assert {row.treatment for row in normed} == {"exact_only"}
    covered = sum(row.count for row in rows.values() if row.treatment == "kronecker")
    trained = sum(row.count for row in rows.values() if row.treatment != "frozen")
    assert run.coverage == pytest.approx(covered / trained)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_other_batch_sizes_run_through_the_same_graph(size: int) -> None:
    torch.manual_seed(0)
    model = models.SelfAttention().eval()
    exported = export_model(model, Inputs(args=(torch.randn(1, 3, 4),)), {})
    assert exported.dynamic
    graph = build(exported.program, device=torch.device("cpu"), dtype=torch.float32, dynamic=True)
    x = torch.randn(size, 3, 4)
    torch.testing.assert_close(graph.run(x).detach(), model(x).detach(), rtol=1e-5, atol=1e-6)


def test_outputs_are_identical_to_the_bit() -> None:
    torch.manual_seed(0)
    for factory, shape in MODELS.values():
        model, x = factory().eval(), torch.randn(shape)
        exported = export_model(model, Inputs(args=(x,)), {})
        graph = build(exported.program, device=torch.device("cpu"), dtype=torch.float32, dynamic=exported.dynamic)
        assert torch.equal(graph.run(x).detach(), model(x).detach())


class MixesExamples(nn.Module):
    """An example's rows depend on its place in the batch, so no permutation carries them over."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[0], dtype=x.dtype).unsqueeze(1)
        return self.head(torch.tanh(self.first(x * position)))


def test_rows_that_follow_no_example_are_refused_by_name() -> None:
    with pytest.raises(LayoutError) as caught:
        curvscope.analyze(MixesExamples(), (torch.randn(6, 4), torch.randint(3, (6,))), loss="cross_entropy")
    assert "layer first" in caught.value.where
    assert "--example-axis" in caught.value.remedy


def test_padding_is_found_and_left_out() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([4, 2, 3, 1, 4])
    mask = torch.arange(4) < lengths[:, None]
    model = models.MaskedPool()
    inputs = torch.randn(5, 4, 3) * mask[..., None]
    run = curvscope.analyze(model, ((inputs, mask), torch.randint(3, (5,))), loss="cross_entropy", dtype="float64")
    row = run.layers["inner"].row
    assert row.padded == pytest.approx(1 - 14 / 20)
    assert row.positions == pytest.approx(14 / 5)
    assert run.layers["head"].row.padded == 0.0


class MaskedHeads(nn.Module):
    """`MaskedPool` with a weight for each of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Parameter(torch.randn(2, 3, 4)), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.tanh(torch.einsum("nthd,hdk->nthk", x.unflatten(-1, (2, 3)), self.inner)).flatten(2)
        return self.head((h * h * (mask / mask.sum(1, keepdim=True)).unsqueeze(-1)).sum(1))


def test_padding_is_left_out_of_groups_too() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([4, 2, 3, 1, 4])
    mask = torch.arange(4) < lengths[:, None]
    x = torch.randn(5, 4, 6)
    run = curvscope.analyze(MaskedHeads(), ((x, mask), torch.randint(3, (5,))), loss="cross_entropy", dtype="float64")
    layer = run.layers["model"]
    assert layer.row.padded == pytest.approx(1 - 14 / 20)
    assert layer.row.positions == pytest.approx(14 / 5)
    real = x.double()[mask].unflatten(-1, (2, 3))
    means = (x.double() * mask[..., None]).sum(1).div(lengths[:, None]).unflatten(-1, (2, 3))
    for flavour, rows in (("expand", real), ("reduce", means)):
        want = torch.einsum("rhi,rhj->hij", rows, rows) / len(rows)
        np.testing.assert_allclose(layer.factors[flavour].A, want.numpy(), rtol=1e-10)


class SlicedAttention(nn.Module):
    """Queries, keys and values by slices of one weight, as nn.MultiheadAttention takes them from several inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = zip((x, x.roll(1, 1), x), self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
        q, k, v = (nn.functional.linear(*part) for part in parts)
        return self.head(torch.tanh((q @ k.mT).softmax(-1) @ v).mean(1))


def test_keys_in_slices_of_a_packed_weight_are_told() -> None:
    torch.manual_seed(0)
    batch = (torch.randn(5, 6, 4), torch.randint(3, (5,)))
    run = curvscope.analyze(SlicedAttention(), batch, loss="cross_entropy", dtype="float64")
    assert run.layers["qkv"].row.positions == 18
    assert run.coverage == 1.0
    told = [row for row in run.findings if row.code == "CS101"]
    assert [row.layer for row in told] == ["qkv"]
    assert "middle third" in told[0].evidence


def test_selection_changes_nothing_but_the_choice() -> None:
    torch.manual_seed(0)
    model = models.MaskedPool()
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 1, 4])[:, None]
    batch = ((torch.randn(5, 4, 3) * mask[..., None], mask), torch.randint(3, (5,)))
    whole = curvscope.analyze(model, batch, loss="cross_entropy", dtype="float64")
    part = curvscope.analyze(model, batch, loss="cross_entropy", dtype="float64", layers="inn*")
    assert list(part.layers) == ["inner"]
    np.testing.assert_array_equal(part.layers["inner"].factors["expand"].A, whole.layers["inner"].factors["expand"].A)
    assert part.model.gradient_norm == pytest.approx(whole.model.gradient_norm, rel=1e-12)
    left_out = [row for row in part.tables["coverage"] if row.layer == "head"]
    assert {row.reason for row in left_out} == {"left out by --layers / --skip"}
    assert list(curvscope.analyze(model, batch, loss="cross_entropy", skip=["inner"]).layers) == ["head"]


def test_a_selection_of_nothing_lists_the_layers() -> None:
    with pytest.raises(ModelError) as caught:
        curvscope.analyze(
            models.mlp(4, 5, 3), (torch.randn(6, 4), torch.randint(3, (6,))), loss="cross_entropy", layers="conv*"
        )
    assert "0, 2" in caught.value.remedy


@pytest.mark.parametrize("eager", [False, True])
def test_a_pattern_that_matches_nothing_is_refused_beside_one_that_does(eager: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    model = Branching(model) if eager else model
    batch = torch.randn(6, 4), torch.randint(3, (6,))
    analyze = functools.partial(curvscope.analyze, model, batch, loss="cross_entropy", measure=())
    for given in ({"layers": ["*0", "nomatch*"]}, {"skip": ["nope"]}, {"layers": ["*0"], "skip": ["*2", "nope"]}):
        with pytest.raises(UsageError, match="matches no layer") as caught:
            analyze(**given)
        assert "0, " in caught.value.remedy
        assert caught.value.exit_code == 2
    # a norm is no linear layer, but it is there
    assert len(analyze(skip=["*1"]).layers) == 2
    with pytest.raises(ModelError, match="--skip leaves out all of them"):
        analyze(skip=["*"])
    with pytest.raises(ModelError, match="--skip leaves out all that --layers keeps"):
        analyze(layers=["*0"], skip=["*0*"])


@pytest.mark.parametrize(
    ("model", "words"),
    [(nn.LayerNorm(4), "no linear layer"), (models.mlp(4, 5, 4).requires_grad_(False), "frozen")],
    ids=["no_linear", "all_frozen"],
)
@pytest.mark.parametrize("eager", [False, True])
def test_nothing_to_analyze(model: nn.Module, words: str, eager: bool) -> None:
    with pytest.raises(ModelError, match=words):
        curvscope.analyze(
            Branching(model) if eager else model,
            (torch.randn(6, 4), torch.randint(3, (6,))),
            loss="cross_entropy",
        )


LAYOUTS = {
    "leading": (Layout(0), (5, 3, 2)),
    "second": (Layout(1), (3, 5, 2)),
    "flattened": (Layout(0, 1, 3), (15, 2)),
    "flattened_minor": (Layout(0, 3, 1), (15, 2)),
    "windowed": (Layout(0, 1, 2), (10, 4, 2)),
    "in_between": (Layout(0, 2, 3), (30, 2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_round_trip(name: str) -> None:
    layout, shape = LAYOUTS[name]
    tensor = torch.randn(shape)
    flat = layout.flat(tensor)
    assert flat.shape[0] == 5
    assert torch.equal(layout.unflat(flat, tensor), tensor)
    assert torch.equal(layout.rows(tensor).flatten(1).sort(1).values, flat.sort(1).values)
    assert layout in candidates({layout.axis: shape[layout.axis] // 5})


class BatchStatistics(nn.Module):
    """Each of these commutes with permutations of the examples and still mixes them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.kind == "batch_norm":
            h = self.norm(h)
        elif self.kind == "centred":
            h = h - h.mean(0)
        elif self.kind == "scaled":
            h = h * h.abs().mean()
        else:
            h = torch.softmax(h @ h.T, -1) @ h
        return self.head(torch.tanh(h))


@pytest.mark.parametrize("kind", ["batch_norm", "centred", "scaled", "attention"])
def test_models_that_mix_examples_are_refused(kind: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(LayoutError, match="mixes examples") as caught:
        curvscope.analyze(BatchStatistics(kind), (torch.randn(6, 4), torch.randint(3, (6,))), loss="cross_entropy")
    assert "layer first" in caught.value.where


class ZeroAdapter(nn.Module):
    """Sequence first, as many tokens as examples, and an adapter whose input is zero: its values tell no layout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.down, self.up, self.head = nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 5), nn.Linear(5, 3)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x.transpose(0, 1)))  # [T, N, 5]
        weights = torch.arange(1, h.shape[0] + 1, dtype=h.dtype)[:, None, None]
        return self.head((weights * torch.tanh(h + self.up(self.down(h)))).mean(0))


def test_layout_of_rows_that_are_all_zero() -> None:
    torch.manual_seed(0)
    model, inputs, targets = ZeroAdapter().double(), torch.randn(6, 6, 3).double(), torch.randint(3, (6,))
    run = curvscope.analyze(model, (inputs, targets), loss="cross_entropy", dtype="float64", dump=("blocks",))
    G = reference.parameter_block(model, inputs, targets, nn.functional.cross_entropy, "up.weight", "up.bias")
    np.testing.assert_allclose(run.layers["up"].block, G.numpy(), rtol=1e-9, atol=1e-14)


class ReadsAWeight(nn.Module):
    """The second use of a weight is no call of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.table, self.tied = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
        self.tied.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)) @ self.second.weight.T
        h = h + self.table(torch.zeros(x.shape[0], dtype=torch.long))
        return self.head(self.tied(torch.tanh(self.second(h))))


def test_eager_fallback_refuses_weights_that_are_read_elsewhere() -> None:
    torch.manual_seed(0)
    batch = (torch.randn(6, 4), torch.randint(3, (6,)))
    run = curvscope.analyze(Branching(ReadsAWeight()), batch, loss="cross_entropy")
    assert list(run.layers) == ["inner.first", "inner.head", "inner.table"]
    rows = {row.parameter: row for row in run.tables["coverage"]}
    assert "read outside" in rows["inner.second.weight"].reason


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pooling": lambda h: h.amax(1),
    "dead_units": lambda h: torch.relu(h).mean(1),
    "selection": lambda h: h[:, 0],
}


class Pooling(nn.Module):
    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool = POOLS[pool]
        self.inner, self.head = nn.Linear(5, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.inner(x)))


@pytest.mark.parametrize("pool", POOLS)
def test_idle_rows_are_no_padding(pool: str) -> None:
    """Rows without a gradient count, unless nothing that is put there could change the output."""
    torch.manual_seed(0)
    run = curvscope.analyze(
        Pooling(pool), (torch.randn(6, 7, 5), torch.randint(3, (6,))), loss="cross_entropy", dtype="float64"
    )
    assert run.layers["inner"].row.padded == 0.0
    assert run.layers["inner"].row.positions == 7


class LooksUp(nn.Module):
    """A table look-up between two layers: no gradient reaches the first, and the second is as good as the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        picked = nn.functional.one_hot(self.first(x).argmax(-1), 3).to(x.dtype)
        return self.head(torch.tanh(self.second(picked)))


@pytest.mark.parametrize("eager", [False, True])
def test_layers_behind_what_lets_no_gradient_through(eager: bool) -> None:
    torch.manual_seed(0)
    model, inputs, targets = LooksUp().double(), torch.randn(9, 4).double(), torch.randint(3, (9,))
    run = curvscope.analyze(
        Branching(model) if eager else model, (inputs, targets), loss="cross_entropy", dtype="float64", dump=("blocks",)
    )
    G = reference.parameter_block(model, inputs, targets, nn.functional.cross_entropy, "second.weight", "second.bias")
    prefix = "inner." if eager else ""
    np.testing.assert_allclose(run.layers[f"{prefix}second"].block, G.numpy(), rtol=1e-9, atol=1e-14)
    assert run.layers[f"{prefix}first"].errors["kfac_expand"].status == "not_assessed"
