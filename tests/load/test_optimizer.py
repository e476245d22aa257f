from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from curvscope.errors import UsageError
from curvscope.load.checkpoint import load_checkpoint
from curvscope.load.optimizer import as_optimizer_state, match_optimizer
from curvscope.load.optimizer_class import class_name_of

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def trained(net: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    net(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    return optimizer


def decay_groups(net: nn.Module) -> list[dict[str, Any]]:
    named = dict(net.named_parameters())
    return [
        {"params": [p for n, p in named.items() if "bias" not in n], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if "bias" in n], "weight_decay": 0.0},
    ]


def test_names_follow_the_optimizers_own_order(net: nn.Module) -> None:
    state = as_optimizer_state(trained(net, torch.optim.AdamW(decay_groups(net))), net)
    assert state.class_name == "AdamW"
    assert state.param_names == ("0.weight", "2.weight", "0.bias", "2.bias")
    stranger = nn.Parameter(torch.zeros(1))
    both = as_optimizer_state(torch.optim.SGD([stranger, *net.parameters()], lr=0.1), net)
    assert both.param_names == ("", *NAMES)


@pytest.mark.parametrize("given", ["a string", torch.optim.SGD([torch.zeros(1)], lr=0.1)], ids=["text", "other"])
def test_what_is_no_optimizer_of_this_model(given: Any, net: nn.Module) -> None:
    with pytest.raises(UsageError):
        as_optimizer_state(given, net)


FORMS = {
    "optimizer": lambda s: {"optimizer": s},
    "optimizer_state_dict": lambda s: {"optimizer_state_dict": s, "step": 5},
    "lightning": lambda s: {"optimizer_states": [s], "global_step": 5},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", ["one", "decay"])
def test_found_in_a_checkpoint(form: str, groups: str, tmp_path: Path, net: nn.Module, make_net: Any) -> None:
    parameters = net.parameters() if groups == "one" else decay_groups(net)
    state = trained(net, torch.optim.SGD(parameters, lr=0.1, momentum=0.9)).state_dict()
    torch.save({"state_dict": net.state_dict(), **FORMS[form](state)}, tmp_path / "c.pt")
    found = load_checkpoint(tmp_path / "c.pt", make_net)
    assert found.optimizer.class_name == "SGD"
    expected = NAMES if groups == "one" else ("0.weight", "2.weight", "0.bias", "2.bias")
    assert found.optimizer.param_names == expected
    for index, name in enumerate(expected):
        assert found.optimizer.state_dict["state"][index]["momentum_buffer"].shape == net.get_parameter(name).shape
    assert found.step == (None if form == "optimizer" else 5)


def test_frozen_parameters_are_passed_over(net: nn.Sequential) -> None:
    net[0].requires_grad_(False)
    state = trained(net, torch.optim.Adam(p for p in net.parameters() if p.requires_grad)).state_dict()
    found, notes = match_optimizer(state, list(net.named_parameters()))
    assert found.param_names == ("2.weight", "2.bias")
    assert not notes


def test_own_names_are_used_and_a_mismatch_is_said(net: nn.Module) -> None:
    state = trained(net, torch.optim.SGD(reversed(list(net.named_parameters())), lr=0.1)).state_dict()
    found, _ = match_optimizer(state, list(net.named_parameters()))
    assert found.param_names == NAMES[::-1]
    other = trained(net, torch.optim.Adam(list(net.parameters())[:3])).state_dict()
    found, notes = match_optimizer(other, list(net.named_parameters()))
    assert found is None
    assert "3 parameters" in notes[0]


CLASSES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam": lambda p: torch.optim.Adam(p),
    "AdamW": lambda p: torch.optim.AdamW(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
}


@pytest.mark.parametrize("name", CLASSES)
def test_class_told_from_the_options(name: str, net: nn.Module) -> None:
    assert class_name_of(CLASSES[name](net.parameters()).state_dict()) == (name, ())


@pytest.mark.parametrize(("decay", "expected", "notes"), [(0.0, "Adam", 0), (0.1, "unknown", 1)])
def test_adam_of_an_older_torch(decay: float, expected: str, notes: int, net: nn.Module) -> None:
    state = torch.optim.Adam(net.parameters(), weight_decay=decay).state_dict()
    for group in state["param_groups"]:
        group.pop("decoupled_weight_decay", None)
    name, said = class_name_of(state)
    assert (name, len(said)) == (expected, notes)
