"""The whole network's tables over several batches, and over pieces of one, are those of one batch in one piece."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import curvscope
from curvscope.extract.pieces import Pieces
from curvscope.load import load_problem
from curvscope.measure import room
from curvscope.measure.halves import halves
from curvscope.measure.network import Network
from tests.extract.test_many_batches import CLASSES, INPUTS, LOSSES, mlp
from tests.many import Tokens, cut, tokens
from tests.networks import all_examples

TABLES = ("steps", "global_damping", "evidence", "stability", "examples")
# Passes are a cost; angles near 0 have their cosine's digits.
COSTS = ("passes",)
# A ratio of two errors that are rounding where K-FAC is exact (the last layer under MSE).
OF_ROUNDING = ("kronecker_limit",)


def analyze(model: Any, batch: Any, loss: Any, **options: Any) -> Any:
    given = {"measure": ("steps", "stability"), "dataset_size": 50, "optimizer": "sgd:lr=0.3,momentum=0.5", "time": 1e6}
    return curvscope.analyze(model, batch, loss=loss, **{"dtype": "float64", "fisher": "exact", **given, **options})


def kept(run: Any, table: str, skip: str) -> list[Any]:
    """The table's rows, without those of approximations to be skipped."""
    rows = [row for row in run.tables[table] if not skip or not getattr(row, "approximation", "").startswith(skip)]
    return [row for row in rows if getattr(row, "quantity", "") not in OF_ROUNDING]


def assert_same(one: Any, other: Any, tables: tuple[str, ...] = TABLES, skip: str = "") -> None:
    for table in tables:
        rows = kept(one, table, skip)
        assert rows, table
        for left, right in zip(rows, kept(other, table, skip), strict=True):
            for column, value in dataclasses.asdict(left).items():
                if column not in COSTS:
                    assert close(value, getattr(right, column), column), (left, right, column)


def close(one: Any, other: Any, column: str) -> bool:
    if not isinstance(one, float) or math.isnan(one):
        return one == other or (isinstance(one, float) and math.isnan(other))
    if "degrees" in column:
        one, other = math.cos(math.radians(one)), math.cos(math.radians(other))
    return math.isclose(one, other, rel_tol=1e-10, abs_tol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_several_batches_are_one(name: str) -> None:
    """Denominators of means differ between batches where class weights and ignored targets do."""
    loss, targets = LOSSES[name]
    batch = (torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64), targets)
    assert_same(analyze(mlp(), batch, loss), analyze(mlp(), cut(batch, [3, 1, 3]), loss))


def in_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """The stages over the whole network take so many examples at once."""
    monkeypatch.setattr(room, "pass_bytes", lambda examples: (0, 1.0))
    original = room.Room

    def small(passes: int, basis: int, together: bool = True) -> Any:
        return original(int(size * room.SLACK), basis, together)

    monkeypatch.setattr(room, "Room", small)


@pytest.mark.parametrize("loss", ["cross_entropy:class_axis=last", "causal_lm"])
def test_tokens_with_padding(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch = Tokens(), tokens()
    options = {"measure": ("steps",)}
    whole = analyze(model, batch, loss, **options)
    # EKFAC's basis is arbitrary where a factor has equal eigenvalues, as the keys' rows of B have
    assert_same(whole, analyze(model, cut(batch, [1, 3, 2]), loss, **options), TABLES, skip="ekfac")
    sizes = spied(monkeypatch)
    in_pieces(monkeypatch, 2)
    found = analyze(model, batch, loss, **options)
    assert 2 in sizes
    assert_same(whole, found, TABLES, skip="ekfac")


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the pieces that the network's passes take."""
    sizes: list[int] = []
    original = Network.outputs

    def outputs(self: Network, piece: Any, parameters: Any = None) -> Tensor:
        sizes.append(piece.layouts.examples)
        return original(self, piece, parameters)

    monkeypatch.setattr(Network, "outputs", outputs)
    return sizes


def test_halves_are_the_same_examples_however_the_data_is_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    weights = torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weights, ignore_index=2)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(5))
    x = INPUTS.double()
    batches: list[tuple[Any, int | None]] = [
        ((x, CLASSES), None),
        ((x, CLASSES), 2),
        (cut((x, CLASSES), [3, 3, 1]), None),
    ]
    for batch, size in batches:
        examples = all_examples(load_problem(model, batch, loss), size)
        parts = halves(Network(examples.pieces.graph, examples), seed=5)
        assert not isinstance(parts, str)
        for part, index in zip(parts, (order[:3], order[3:]), strict=True):
            seen = torch.cat([piece.tensors[0] for piece in part.network.pieces()])
            assert sorted(seen.tolist()) == sorted(x[index].tolist())
            value = loss(model(x[index]), CLASSES[index])
            wanted = torch.autograd.grad(value, list(model.parameters()))
            assert part.network.value == pytest.approx(float(value.detach()), rel=1e-12)
            for name, want in zip(dict(model.named_parameters()), wanted, strict=True):
                assert torch.allclose(part.network.gradient()[name], want, rtol=1e-10, atol=1e-14)


def test_one_batch_is_held_at_a_time() -> None:
    """Whatever the passes make of a piece is gone when the next one but one is read."""
    import gc
    import weakref

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    made: list[Any] = []

    def source() -> Any:
        for _ in range(5):
            gc.collect()  # a piece, the one that is read next, and the first
            assert sum(reference() is not None for reference in made[-5:]) <= 3
            inputs = torch.ones(4, 5, dtype=torch.float64)
            made.append(weakref.ref(inputs))
            yield inputs, torch.tensor([0, 1, 2, 3])

    examples = all_examples(load_problem(model, source, "cross_entropy"))
    network = Network(examples.pieces.graph, examples)
    vector = {name: torch.ones_like(p) for name, p in network.parameters.items()}
    gc.freeze()  # all that other tests left is not looked through again
    try:
        for call in (network.hessian_product(), network.ggn_product(), network.ggn_form()):
            call(vector)
        network.example_curvature(vector)
    finally:
        gc.unfreeze()


OPERATIONS: dict[str, Callable[[Network, Any], Any]] = {
    "hessian": lambda network, v: network.hessian_product()(v),
    "ggn": lambda network, v: network.ggn_product()(v),
    "form": lambda network, v: {"": torch.tensor(network.ggn_form()(v))},
    "examples": lambda network, v: {"": network.example_curvature(v)},
    "loss": lambda network, v: {"": torch.tensor(network.loss(network.moved(v)))},
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_memory_that_runs_out_makes_smaller_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    problem = load_problem(mlp(), (INPUTS, CLASSES), "cross_entropy")
    examples = all_examples(problem)
    network = Network(examples.pieces.graph, examples)
    vector = {key: torch.randn_like(p) for key, p in network.parameters.items()}
    whole = OPERATIONS[name](network, vector)
    fail_above(monkeypatch, 2)
    found = OPERATIONS[name](network, vector)
    assert network.examples.pieces.size == 1
    for key, tensor in whole.items():
        assert torch.allclose(found[key], tensor, rtol=1e-12, atol=1e-16)


def test_a_graph_that_was_kept_is_not_taken_for_that_of_a_smaller_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    examples = all_examples(load_problem(mlp(), (INPUTS, CLASSES), "cross_entropy"))
    network = Network(examples.pieces.graph, examples)
    vector = {key: torch.randn_like(p) for key, p in network.parameters.items()}
    product = network.hessian_product()
    whole = product(vector)
    assert examples.halve()
    for key, tensor in product(vector).items():
        assert torch.allclose(tensor, whole[key], rtol=1e-12, atol=1e-16)


def fail_above(monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    original = Network.outputs

    def outputs(self: Network, piece: Any, parameters: Any = None) -> Tensor:
        if piece.layouts.examples > examples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, piece, parameters)

    monkeypatch.setattr(Network, "outputs", outputs)


def test_through_the_analysis_memory_that_runs_out_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = analyze(mlp(), (INPUTS, CLASSES), "cross_entropy")
    fail_above(monkeypatch, 2)
    assert_same(whole, analyze(mlp(), (INPUTS, CLASSES), "cross_entropy"), TABLES)


@pytest.mark.parametrize("stage", ["network", "graph", "steps", "stability"])
def test_what_no_piece_is_small_enough_for_is_not_assessed(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise MemoryError

    target = {
        "network": "curvscope.measure.network.Network.outputs",
        "graph": "curvscope.measure.network.Network._hessian",
        "steps": "curvscope.measure.whole.WholeNetwork.finish",
        "stability": "curvscope.pipeline.stability_stage",
    }[stage]
    monkeypatch.setattr(target, fail)
    run = analyze(mlp(), (INPUTS, CLASSES), "cross_entropy")
    assert run.layers["0"].errors["kfac_expand"].status == "ok"
    if stage in ("network", "steps"):
        assert {row.status for row in run.tables["steps"]} == {"not_assessed"}
        assert any("steps and evidence are not assessed: memory ran out" in note for note in run.notes)
    if stage in ("network", "stability"):
        assert any("Stability is not assessed: memory ran out" in note for note in run.notes)
    if stage == "graph":
        (row,) = (row for row in run.tables["stability"] if row.quantity == "preconditioned_sharpness")
        assert row.status == "not_assessed"
        assert "memory ran out" in row.reason


def test_pieces_follow_the_bound() -> None:
    """As many of one size as keep a product's graph to what is left of the bound."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4000), nn.Tanh(), nn.Linear(4000, 4))
    examples = all_examples(load_problem(model, (torch.randn(64, 5), torch.randint(4, (64,))), "cross_entropy"))
    _, each = room.pass_bytes(examples) or (0, 0)
    assert 2 * 4000 * 8 < each < 30 * 4000 * 8  # some activations of 4000 numbers
    fits, less = (room.fitted(examples, room.Room(int(share * room.SLACK * 64 * each), 1)) for share in (2.1, 0.3))
    assert (fits[0].pieces.size, fits[1].together) == (None, True)
    assert (less[0].pieces.size, less[1].together) == (16, False)
    assert isinstance(less[0].pieces, Pieces)
