"""Batches of graphs against the curvature of every graph on its own, by brute force in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import curvscope
from curvscope.errors import BatchError, LayoutError
from curvscope.extract.roots import make_root
from curvscope.graph.ragged import Ragged
from curvscope.load.loss import load_loss
from tests.graph_cases import Messages, OneGraph, curvature, joined, parameter_block, pooled, rings

TOLERANCE = 1e-9
SIZES = {"unequal": [3, 5, 2, 4, 6], "two": [4, 2], "one": [5], "equal": [3, 3, 3]}


def close(got: Any, expected: Tensor, what: str) -> None:
    got = torch.as_tensor(got)
    assert got.shape == expected.shape, what
    gap = float((got - expected).abs().max() / expected.abs().max())
    assert gap < TOLERANCE, f"{what}: {gap:.2g}"


def check_layers(run: Any, expected: dict[str, Any]) -> None:
    for name, reference in expected.items():
        layer = run.layers[name]
        close(layer.block, reference.G, f"{name} G")
        for flavour in ("expand", "reduce"):
            factors = layer.factors[flavour]
            close(factors.A, reference.A[flavour], f"{name} A {flavour}")
            close(factors.B, reference.B[flavour], f"{name} B {flavour}")


def analyze(model: nn.Module, inputs: Any, targets: Tensor, loss: Any = "cross_entropy", **options: Any) -> Any:
    options = {"dtype": "float64", "fisher": "exact", "dump": "blocks"} | options
    return curvscope.analyze(model.float(), (inputs, targets), loss=loss, **options)


@pytest.fixture
def model() -> Messages:
    torch.manual_seed(0)
    return Messages()


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("sizes", list(SIZES.values()), ids=list(SIZES))
def test_graph_outputs(sizes: list[int], shuffle: bool, model: Messages) -> None:
    graphs = rings(sizes)
    inputs, _ = joined(graphs, shuffle)
    targets = torch.arange(len(sizes)) % 3
    run = analyze(model, inputs, targets, example_index="batch")
    expected = curvature(model, graphs, ["node", "edge", "update", "head"], F.cross_entropy, targets)
    check_layers(run, expected)
    assert run.model.examples == len(sizes)
    assert run.layers["node"].row.positions == pytest.approx(sum(sizes) / len(sizes))
    assert run.layers["edge"].row.positions == pytest.approx(len(inputs["edge_index"][0]) / len(sizes))
    assert run.layers["head"].row.positions == 1
    assert all(layer.row.padded == 0 for layer in run.layers.values())
    names = ["norm.weight", "norm.bias"]
    close(run.layers["norm"].block, parameter_block(model, graphs, names, F.cross_entropy, targets), "norm")
    close(run.layers["gate"].block, parameter_block(model, graphs, ["gate"], F.cross_entropy, targets), "gate")
    norm = sum(float(p.grad.square().sum()) for p in with_gradient(model, inputs, targets)) ** 0.5
    assert run.model.gradient_norm == pytest.approx(norm, rel=1e-9)


def with_gradient(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> list[Any]:
    model.double().zero_grad()
    F.cross_entropy(model(**inputs), targets).backward()
    return list(model.parameters())


def some_ignored(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, ignore_index=-100, label_smoothing=0.1)


NODE_LOSSES = {
    "cross_entropy": ("cross_entropy:label_smoothing=0.1", some_ignored),
    "mse": ("mse", F.mse_loss),
    "bce": ("bce_with_logits", F.binary_cross_entropy_with_logits),
    "callable": (lambda o, t: (o - t).pow(4).mean(), lambda o, t: (o - t).pow(4).mean()),
}


@pytest.mark.parametrize("index", ["batch", None], ids=["indexed", "whole"])
@pytest.mark.parametrize("name", list(NODE_LOSSES))
def test_node_outputs(name: str, index: str | None) -> None:
    torch.manual_seed(1)
    model = Messages(of_nodes=True)
    graphs = rings([3, 5, 2])
    inputs, order = joined(graphs, shuffle=True)
    given, loss = NODE_LOSSES[name]
    targets = torch.arange(10) % 3
    targets[[1, 4, 8]] = -100
    targets = targets if name == "cross_entropy" else torch.rand(10, 3, generator=torch.Generator().manual_seed(3))
    targets = targets if name == "cross_entropy" else targets.double()
    run = analyze(model, inputs, targets[order], given, example_index=index)
    reference = graphs if index else [whole(graphs)]
    expected = curvature(model, reference, ["node", "edge", "update", "head"], loss, targets)
    check_layers(run, expected)
    assert run.model.examples == len(reference)
    value = loss(model(**inputs).detach()[order.argsort()], targets)
    assert run.model.loss == pytest.approx(float(value), rel=1e-9)


def whole(graphs: list[OneGraph]) -> OneGraph:
    inputs, _ = joined(graphs, shuffle=False)
    return OneGraph(inputs["x"], inputs["edge_index"], inputs["edge_attr"])


def test_a_whole_graph_is_said_to_be_one_example(model: Messages) -> None:
    inputs, _ = joined(rings([3, 4]), shuffle=False)
    run = analyze(Messages(of_nodes=True), inputs, torch.arange(7) % 3)
    assert any("edges in input edge_index" in note and "--example-index" in note for note in run.notes)
    assert run.model.examples == 1
    assert not any(
        "one example" in note for note in analyze(model, inputs, torch.tensor([0, 1]), example_index="batch").notes
    )


@pytest.mark.parametrize("name", ["cross_entropy", "mse"])
def test_roots_of_ragged_outputs(name: str) -> None:
    """Every form of the root is right at every node: none of what an empty slot holds is written to a node."""
    owner = torch.tensor([1, 0, 1, 2, 1, 0])
    outputs = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # graph 0 has one term that counts, graph 2 none, graph 3 no row at all: empty slots would point at row 0
    targets: Tensor = torch.tensor([2, 0, 1, -100, 0, -100])
    targets = targets if name == "cross_entropy" else torch.rand(6, 3, dtype=torch.float64)
    loss = load_loss(name)
    layout = Ragged.of(0, owner, 4)
    full = torch.autograd.functional.hessian(lambda o: loss(o, targets), outputs).flatten(2).flatten(0, 1)
    gradient = torch.autograd.functional.jacobian(lambda o: loss(o, targets), outputs)

    def root(fisher: str) -> Any:
        return make_root(loss, outputs, targets, layout, fisher=fisher, samples=4000, seed=0)

    def square(fisher: str) -> Tensor:
        """The sum of all columns' outer products, within graphs."""
        made = root(fisher)
        columns = torch.stack([made.column(k).flatten() for k in range(made.columns)]) / made.unit
        same = (owner[:, None] == owner).repeat_interleave(3, 0).repeat_interleave(3, 1)
        return columns.T @ columns * same

    close(square("exact"), full, "exact")
    assert root("exact").columns == (6 if name == "cross_entropy" else 9)
    for fisher in ("probe", "mc"):
        assert (square(fisher) - full).abs().max() < 0.1 * full.abs().max()
    weight = 4 if name == "cross_entropy" else 18
    close(root("empirical").column(0) / root("empirical").unit, gradient * weight**0.5, "empirical")


@pytest.mark.parametrize("fisher", ["mc", "probe", "empirical"])
def test_estimates_run_on_graphs(fisher: str) -> None:
    torch.manual_seed(1)
    inputs, _ = joined(rings([3, 5, 2]), shuffle=True)
    run = analyze(
        Messages(of_nodes=True), inputs, torch.arange(10) % 3, fisher=fisher, samples=4, example_index="batch"
    )
    assert run.layers["node"].factors["expand"].B.shape == (4, 4)
    assert run.model.examples == 3


class Edgeless(nn.Module):
    """A layer on edges alone, of which some graphs have none, and a depthwise convolution over the nodes' features."""

    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.Linear(2, 4)
        self.conv = nn.Conv1d(2, 4, 2, groups=2)
        self.plain = nn.Conv1d(4, 3, 2)
        self.head = nn.Linear(4 + 3, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, edge_attr: Tensor) -> Tensor:
        h = torch.tanh(self.edge(edge_attr))
        h = h.new_zeros(len(x), 4).index_add(0, edge_index[1], h)
        of_nodes = torch.tanh(self.plain(torch.tanh(self.conv(torch.stack([x, x.square()], dim=1)))))
        return self.head(torch.cat([pooled(h, batch), pooled(of_nodes.flatten(1), batch)], dim=1))


def test_graphs_without_edges_and_convolutions_over_nodes() -> None:
    torch.manual_seed(2)
    model = Edgeless()
    graphs = rings([3, 2, 4])
    graphs[1] = dataclasses.replace(graphs[1], edges=graphs[1].edges[:, :0], edge_features=graphs[1].edge_features[:0])
    targets = torch.tensor([0, 2, 1])
    inputs, _ = joined(graphs, shuffle=True)
    run = analyze(model, inputs, targets, example_index="batch")
    check_layers(run, curvature(model, graphs, ["edge", "head"], F.cross_entropy, targets))
    names = ["plain.weight", "plain.bias"]
    block = parameter_block(model, graphs, names, F.cross_entropy, targets)
    # per parameter there, per output row here: weight row with its bias
    places = torch.cat([torch.arange(24).view(3, 8), torch.arange(24, 27).view(3, 1)], dim=1).flatten()
    close(run.layers["plain"].block, block[places][:, places], "plain G")
    # every node has one patch of the second convolution and two of the first; counted, not slots
    assert run.layers["plain"].row.positions == pytest.approx(3)
    assert run.layers["conv"].row.positions == pytest.approx(6)
    x = torch.stack([inputs["x"], inputs["x"].square()], dim=1)
    rows = x.unfold(2, 2, 1).permute(0, 2, 1, 3).reshape(-1, 2, 2)
    ones = torch.cat([rows, torch.ones(len(rows), 2, 1)], dim=2).double()
    close(run.layers["conv"].factors["expand"].A, torch.einsum("rgi,rgj->gij", ones, ones) / len(rows), "conv A")
    means = torch.stack([ones.view(9, 2, 2, 3)[inputs["batch"] == n].flatten(0, 1).mean(0) for n in range(3)])
    close(run.layers["conv"].factors["reduce"].A, torch.einsum("ngi,ngj->gij", means, means) / 3, "conv A reduce")


class Kept(nn.Module):
    """Keeps the nodes whose score is above a bound, in the order of their scores: rows that no input has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, edge_attr: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        order = torch.argsort(x[:, 0], descending=True)
        order = order[(x[order, 0] > -0.5).nonzero().flatten()]
        graphs = int(batch.max()) + 1
        h = torch.tanh(self.second(h[order]))
        return self.head(h.new_zeros(graphs, 4).index_add(0, batch[order], h))


def test_rows_that_no_input_has_are_read_off_the_gradients() -> None:
    torch.manual_seed(3)
    model = Kept()
    graphs = rings([4, 5, 3], seed=4)
    targets = torch.tensor([0, 2, 1])
    inputs, _ = joined(graphs, shuffle=True)
    assert 0 < int((inputs["x"][:, 0] > -0.5).sum()) < 12
    run = analyze(model, inputs, targets, example_index="batch")
    check_layers(run, curvature(model, graphs, ["first", "second", "head"], F.cross_entropy, targets))


class Mixed(Messages):
    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, edge_attr: Tensor) -> Tensor:
        h = torch.tanh(self.node(x))
        return self.head(pooled(h - h.mean(0), batch))


class Unreached(Messages):
    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, edge_attr: Tensor) -> Tensor:
        h = self.edge(torch.cat([x, x, x, x[:, :1]], dim=1)[batch.argsort()[:-2]])
        return self.head(h.new_zeros(3, 4).index_add(0, batch.sort().values[:-2], h.relu() * (h[:, :1] > 0)))


@pytest.mark.parametrize(("kind", "words"), [(Mixed, "mixes graphs"), (Unreached, "can't be assigned to graphs")])
def test_refusals_of_layouts(kind: type[Messages], words: str) -> None:
    torch.manual_seed(0)
    inputs, _ = joined(rings([3, 4, 2]), shuffle=False)
    with pytest.raises(LayoutError, match=words) as refusal:
        analyze(kind(), inputs, torch.tensor([0, 1, 2]), example_index="batch")
    assert "without --example-index" in refusal.value.remedy


def test_edges_between_graphs_are_a_mixture(model: Messages) -> None:
    inputs, _ = joined(rings([3, 4]), shuffle=False)
    inputs["edge_index"] = torch.cat([inputs["edge_index"], torch.tensor([[0], [4]])], dim=1)
    inputs["edge_attr"] = torch.cat([inputs["edge_attr"], inputs["edge_attr"][:1]])
    with pytest.raises(LayoutError, match="mixes graphs"):
        analyze(model, inputs, torch.tensor([0, 1]), example_index="batch")


BAD = {
    "no such input": ("graph", None, "no input named 'graph'"),
    "no vector": ("x", None, "is no batch vector"),
    "a gap": ("batch", torch.tensor([0, 0, 0, 2, 2, 2, 2]), "no node of graph 1"),
    "negative": ("batch", torch.tensor([-1, 0, 0, 1, 1, 1, 1]), "negative numbers"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_batch_vectors(case: str, model: Messages) -> None:
    name, vector, words = BAD[case]
    inputs, _ = joined(rings([3, 4]), shuffle=False)
    inputs["batch"] = inputs["batch"] if vector is None else vector
    with pytest.raises(BatchError, match=words):
        analyze(Messages(of_nodes=True), inputs, torch.arange(7) % 3, example_index=name)


def test_axis_and_index_exclude_each_other(model: Messages) -> None:
    inputs, _ = joined(rings([3, 4]), shuffle=False)
    with pytest.raises(BatchError, match="two ways"):
        analyze(model, inputs, torch.tensor([0, 1]), example_index="batch", example_axes={"x": 0})


@pytest.mark.parametrize("positional", [True, False])
def test_a_bundle_remembers_the_batch_vector(positional: bool, model: Messages, tmp_path: Path) -> None:
    inputs, _ = joined(rings([3, 4, 2]), shuffle=True)
    given: Any = tuple(inputs.values()) if positional else inputs
    inputs = {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()}
    targets = torch.tensor([0, 2, 1])
    index: Any = 2 if positional else "batch"
    curvscope.capture(tmp_path / "g.pt", model.double(), (given, targets), "cross_entropy", example_index=index)
    own = curvscope.analyze(tmp_path / "g.pt", dtype="float64", dump="blocks")
    expected = curvature(model, rings([3, 4, 2]), ["node", "edge", "update", "head"], F.cross_entropy, targets)
    check_layers(own, expected)
    assert own.model.examples == 3
    other, _ = joined(rings([3, 4, 2], seed=5), shuffle=True)
    batch = (tuple(other.values()) if positional else other, targets)
    again = curvscope.analyze(tmp_path / "g.pt", batch, dtype="float64", dump="blocks")
    expected = curvature(model, rings([3, 4, 2], seed=5), ["node", "edge", "update", "head"], F.cross_entropy, targets)
    check_layers(again, expected)
