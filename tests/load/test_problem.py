from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from curvscope.errors import BatchError, CheckpointError, LossError, ModelError
from curvscope.load import check_weights, load_problem


def test_a_module_is_used_as_it_is(net: nn.Module, pair: Any) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    problem = load_problem(net, pair, nn.CrossEntropyLoss(), optimizer=optimizer, example_axes={"0": 0}, step=4)
    assert problem.model is net
    assert problem.inputs.args[0] is pair[0]
    assert (problem.name, problem.source, problem.step) == ("Sequential", "Sequential", 4)
    assert problem.optimizer.class_name == "SGD"
    assert problem.example_axes == {"0": 0}
    assert net.training


def test_from_files_alone(net: nn.Module, pair: Any, factories: str, tmp_path: Path) -> None:
    torch.save({"model": net.state_dict(), "step": 8}, tmp_path / "c.pt")
    torch.save({"inputs": pair[0], "targets": pair[1]}, tmp_path / "b.pt")
    problem = load_problem("c.pt", "b.pt", "cross_entropy:reduction=sum", factory=f"{factories}:make")
    assert torch.equal(problem.model(*problem.inputs.args), net(pair[0]))
    assert (problem.source, problem.step, problem.name) == ("c.pt", 8, "Sequential")
    assert problem.loss.label == "cross_entropy(reduction=sum)"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, net: nn.Sequential, pair: Any) -> None:
    with torch.no_grad():
        net[2].weight[1, 3] = value
    with pytest.raises(ModelError, match=r"2\.weight holds 1 of 15 .* index \[1, 3\]"):
        load_problem(net, pair, "cross_entropy")


def test_a_mask_of_minus_infinity_is_no_fault() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.full((2, 2), float("-inf")))
    check_weights(module)
    module.mask[0, 0] = float("nan")
    with pytest.raises(ModelError, match="mask"):
        check_weights(module)


@pytest.mark.parametrize(
    ("batch", "loss", "kind"),
    [(None, "mse", BatchError), ("pair", None, LossError)],
    ids=["no batch", "no loss"],
)
def test_what_is_missing_is_asked_for(batch: Any, loss: Any, kind: type, net: nn.Module, pair: Any) -> None:
    with pytest.raises(kind, match=r"--batch|--loss"):
        load_problem(net, pair if batch else None, loss)


def test_what_is_no_model(pair: Any) -> None:
    with pytest.raises(CheckpointError, match="int"):
        load_problem(3, pair, "mse")


NORM, STATELESS, DROPOUT = nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False), nn.Dropout(0.1)
MODES: dict[str, tuple[nn.Module, tuple[str, ...]]] = {
    "neither": (nn.Dropout(0.0), ()),
    "norm": (NORM, ("BatchNorm uses its running statistics",)),
    "norm without statistics": (STATELESS, ("BatchNorm keeps no running statistics and uses the batch's own",)),
    "dropout": (DROPOUT, ("dropout is off",)),
    "both": (nn.Sequential(NORM, DROPOUT), ("BatchNorm uses its running statistics", "dropout is off")),
    "attention": (nn.MultiheadAttention(4, 2, dropout=0.1), ("dropout is off",)),
    "recurrent": (nn.LSTM(4, 4, num_layers=2, dropout=0.1), ("dropout is off",)),
    "recurrent, one layer": (nn.Sequential(nn.LSTM(4, 4)), ()),
}


@pytest.mark.parametrize("name", MODES)
def test_what_eval_mode_hides(name: str) -> None:
    module, words = MODES[name]
    model = nn.ModuleList([nn.Linear(4, 3), module])
    problem = load_problem(model, (torch.ones(2, 4), torch.zeros(2, dtype=torch.long)), "cross_entropy")
    assert problem.hidden_by_eval == words


def test_an_input_may_be_named_by_a_number() -> None:
    pair = (torch.ones(2, 4), torch.zeros(2, dtype=torch.long))
    assert load_problem(nn.Linear(4, 3), pair, "cross_entropy", example_axes={0: 1}).example_axes == {"0": 1}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "nested", "quantized"])
def test_tensors_of_another_kind_are_refused(kind: str) -> None:
    x = {
        "sparse_coo": lambda: torch.eye(3).to_sparse(),
        "sparse_csr": lambda: torch.eye(3).to_sparse_csr(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.quint8),
    }[kind]()
    with pytest.raises(BatchError, match=f"a {kind} tensor"):
        load_problem(nn.Linear(3, 3), (x, torch.zeros(3, dtype=torch.long)), "cross_entropy")
