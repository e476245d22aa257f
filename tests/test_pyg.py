"""PyTorch Geometric's own networks on batches of graphs, against every graph on its own in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import curvscope
from tests.graph_cases import curvature, joined, parameter_block, rings

nn_geometric = pytest.importorskip("torch_geometric.nn", reason="torch_geometric is not installed (extra 'test')")
TOLERANCE = 1e-9


class Pooled(nn.Module):
    """A network over nodes, the mean over each graph's, and a linear head."""

    def __init__(self, gnn: nn.Module, reads_edges: bool = False) -> None:
        super().__init__()
        self.gnn = gnn
        self.head = nn.Linear(6, 3)
        self.reads_edges = reads_edges

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, edge_attr: Tensor) -> Tensor:
        more = {"edge_attr": edge_attr} if self.reads_edges else {}
        return self.head(nn_geometric.global_mean_pool(self.gnn(x, edge_index, **more), batch))


CASES: dict[str, Callable[[], nn.Module]] = {
    "GCN": lambda: Pooled(nn_geometric.GCN(3, 8, 2, 6, norm="BatchNorm")),
    "GCNConv": lambda: Pooled(nn_geometric.GCNConv(3, 6)),
    "GAT": lambda: Pooled(nn_geometric.GAT(3, 8, 2, 6, heads=2, edge_dim=2), reads_edges=True),
    "GATv2": lambda: Pooled(nn_geometric.GAT(3, 6, 1, 6, heads=2, v2=True, edge_dim=2), reads_edges=True),
    "GIN": lambda: Pooled(nn_geometric.GIN(3, 8, 2, 6)),
}


def gap(got: Any, expected: Tensor) -> float:
    return float((torch.as_tensor(got) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("sizes", [[3, 1, 4, 2], [4, 2]], ids=["four", "two"])
@pytest.mark.parametrize("name", list(CASES))
def test_every_parameter_is_covered_and_right(name: str, sizes: list[int]) -> None:
    torch.manual_seed(0)
    model = CASES[name]()
    graphs = rings(sizes)  # the ring of one has a self-loop, which graph attention takes out and puts back
    inputs, _ = joined(graphs, shuffle=True)
    targets = torch.arange(len(sizes)) % 3
    options: dict[str, Any] = {"dtype": "float64", "fisher": "exact", "dump": "blocks", "example_index": "batch"}
    run = curvscope.analyze(model, (inputs, targets), loss="cross_entropy", **options)
    treatments = {row.parameter: row.treatment for row in run.tables["coverage"]}
    assert treatments.keys() == dict(model.named_parameters()).keys()
    assert set(treatments.values()) <= {"kronecker", "exact_only"}
    assert run.model.examples == len(sizes)
    linear = [name for name, layer in run.layers.items() if layer.factors]
    expected = curvature(model, graphs, linear, F.cross_entropy, targets)
    for layer_name, layer in run.layers.items():
        if layer_name in linear:
            reference = expected[layer_name]
            assert gap(layer.block, reference.G) < TOLERANCE, layer_name
            for flavour in ("expand", "reduce"):
                assert gap(layer.factors[flavour].A, reference.A[flavour]) < TOLERANCE, layer_name
                assert gap(layer.factors[flavour].B, reference.B[flavour]) < TOLERANCE, layer_name
        else:
            members = [row.parameter for row in run.tables["coverage"] if row.layer == layer_name]
            block = parameter_block(model, graphs, members, F.cross_entropy, targets)
            assert gap(layer.block, block) < TOLERANCE, layer_name


def test_rows_of_edges_have_a_self_loop_for_every_node() -> None:
    torch.manual_seed(0)
    inputs, _ = joined(rings([3, 1, 4, 2]), shuffle=True)
    run = curvscope.analyze(
        CASES["GAT"](), (inputs, torch.tensor([0, 1, 2, 0])), loss="cross_entropy", example_index="batch"
    )
    source, target = inputs["edge_index"]
    edges = int((source != target).sum()) + len(inputs["x"])
    assert run.layers["gnn.convs.0.lin_edge"].row.positions == pytest.approx(edges / 4)
    assert run.layers["gnn.convs.0.lin"].row.positions == pytest.approx(10 / 4)


def test_masked_nodes_of_one_graph() -> None:
    """Node classification: positional inputs, the targets of most nodes ignored, the whole graph one example."""
    torch.manual_seed(0)
    model = nn_geometric.GCN(3, 8, 2, 4, cached=True)
    inputs, _ = joined(rings([7]), shuffle=True)
    targets = torch.tensor([0, 3, -100, -100, 1, -100, -100])
    given = (inputs["x"], inputs["edge_index"])
    run = curvscope.analyze(model, (given, targets), loss="cross_entropy", dtype="float64", dump="blocks")
    assert model.convs[0]._cached_edge_index is None
    assert run.model.examples == 1
    assert run.layers["convs.1.lin"].row.columns == 9  # three terms of three columns
    assert any("the whole of it is one example" in note for note in run.notes)
    model = model.double()
    logits = model(*given)
    H = torch.autograd.functional.hessian(lambda o: F.cross_entropy(o.view(7, 4), targets), logits.detach().flatten())
    for name in ("convs.0.lin", "convs.1.lin"):
        weight = model.get_submodule(name).weight
        J = torch.stack([torch.autograd.grad(o, weight, retain_graph=True)[0].flatten() for o in logits.flatten()])
        assert gap(run.layers[name].block, J.T @ H @ J) < TOLERANCE


def test_a_bundle_needs_no_torch_geometric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = CASES["GCNConv"]()
    inputs, _ = joined(rings([3, 1, 4, 2]), shuffle=True)
    inputs = {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()}
    targets = torch.tensor([0, 1, 2, 0])
    curvscope.capture(tmp_path / "g.pt", model, (inputs, targets), "cross_entropy", example_index="batch")
    direct = curvscope.analyze(model, (inputs, targets), loss="cross_entropy", example_index="batch", dtype="float64")
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    run = curvscope.analyze(tmp_path / "g.pt", dtype="float64")
    for name, layer in direct.layers.items():
        for flavour, factors in layer.factors.items():
            assert gap(run.layers[name].factors[flavour].A, torch.as_tensor(factors.A)) < 1e-12
            assert gap(run.layers[name].factors[flavour].B, torch.as_tensor(factors.B)) < 1e-12
