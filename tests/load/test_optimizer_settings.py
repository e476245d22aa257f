"""Settings read from real torch.optim objects: the step they predict is the optimizer's own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvscope.errors import UsageError
from curvscope.load.checkpoint import load_checkpoint
from curvscope.load.optimizer import as_optimizer_state, match_optimizer
from curvscope.load.optimizer_class import class_name_of
from curvscope.load.optimizer_options import optimizer_options
from curvscope.load.optimizer_settings import OptimizerSettings, optimizer_settings
from curvscope.load.problem import OptimizerState
from curvscope.load.surroundings import find_clip, with_surroundings
from curvscope.measure.preconditioner import Preconditioner, preconditioner
from curvscope.measure.update import next_update

optim = torch.optim
OPTIMIZERS: dict[str, tuple[str, Callable[[Iterable[Any]], optim.Optimizer]]] = {
    "sgd": ("sgd", lambda p: optim.SGD(p, lr=0.1)),
    "sgd decay": ("sgd", lambda p: optim.SGD(p, lr=0.1, weight_decay=0.03)),
    "heavy ball": ("sgd", lambda p: optim.SGD(p, lr=0.1, momentum=0.9)),
    "dampening": ("sgd", lambda p: optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.1)),
    "nesterov": ("sgd", lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
    "maximize": ("sgd", lambda p: optim.SGD(p, lr=0.1, momentum=0.9, maximize=True)),
    "adam": ("adam", lambda p: optim.Adam(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)),
    "amsgrad": ("adam", lambda p: optim.Adam(p, lr=0.01, amsgrad=True, eps=1e-3)),
    "adam decoupled": ("adam", lambda p: optim.Adam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)),
    "adamw": ("adamw", lambda p: optim.AdamW(p, lr=torch.tensor(0.01, dtype=torch.float64), weight_decay=0.1)),
    "nadam": ("nadam", lambda p: optim.NAdam(p, lr=0.01, weight_decay=0.1)),
    "nadam decoupled": ("nadam", lambda p: optim.NAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)),
    "rmsprop": ("rmsprop", lambda p: optim.RMSprop(p, lr=0.01, weight_decay=0.1)),
    "rmsprop momentum": ("rmsprop", lambda p: optim.RMSprop(p, lr=0.01, alpha=0.9, momentum=0.7)),
    "centered": ("rmsprop", lambda p: optim.RMSprop(p, lr=0.01, centered=True, momentum=0.7)),
    "adagrad": ("adagrad", lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.2, weight_decay=0.1)),
}


def double_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def shapes_of(net: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in net.named_parameters()}


def random_step(net: nn.Module, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def settled(net: nn.Module, optimizer: Any, **options: Any) -> OptimizerSettings:
    found = optimizer_settings(as_optimizer_state(optimizer, net), shapes_of(net), optimizer_options(options))
    assert found is not None
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_predicted_step_is_the_optimizers_own(name: str) -> None:
    kind, make = OPTIMIZERS[name]
    net = double_net()
    weights, biases = [net[0].weight, net[2].weight], [net[2].bias, net[0].bias]
    optimizer = make([{"params": weights}, {"params": biases, "lr": 0.02, "weight_decay": 0.0}])
    for _ in range(3):
        random_step(net, optimizer)
    settings = settled(net, optimizer)
    assert settings.kind == kind
    assert bool(settings.problem) == (name == "maximize")
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    frozen = {key: {k: t.clone() for k, t in one.moments.items()} for key, one in settings.parameters.items()}
    for key, one in settings.parameters.items():
        one.moments.update(frozen[key])  # type: ignore[attr-defined]
    gradient = random_step(net, optimizer)
    predicted = next_update(settings, before, gradient)
    for key, p in net.named_parameters():
        real = p.detach() - before[key]
        assert float((predicted[key] - real).abs().max()) <= 1e-10 * float(real.abs().max()), key


def test_groups_by_name() -> None:
    net = double_net()
    optimizer = optim.SGD([{"params": [net[2].bias]}, {"params": [net[0].weight], "lr": 0.5}], lr=0.1, momentum=0.9)
    found = settled(net, optimizer)
    assert {name: one.lr for name, one in found.parameters.items()} == {"0.weight": 0.5, "2.bias": 0.1}
    assert found.problem == ""
    assert "2 trained parameters are not in the optimizer" in found.notes[0]
    assert found.label == "SGD, lr 0.1 to 0.5 (2 values), momentum 0.9"


def test_missing_state_is_told() -> None:
    net = double_net()
    found = settled(net, optim.AdamW(net.parameters()))
    assert "no exp_avg_sq of 0.weight" in found.problem
    assert settled(net, optim.SGD(net.parameters(), lr=0.1)).problem == ""
    assert "no stability threshold is known for Adamax" in settled(net, optim.Adamax(net.parameters())).problem
    assert "maximizes" in settled(net, optim.SGD(net.parameters(), lr=0.1, maximize=True)).problem


def test_a_moment_of_another_shape_is_told() -> None:
    net = double_net()
    optimizer = optim.Adam(net.parameters())
    random_step(net, optimizer)
    state = as_optimizer_state(optimizer, net)
    state.state_dict["state"][0]["exp_avg_sq"] = torch.zeros(2, 2)
    found = optimizer_settings(state, shapes_of(net))
    assert "exp_avg_sq is [2, 2], the parameter [5, 4]" in found.problem


def test_an_older_adam_is_not_guessed_and_can_be_named() -> None:
    net = double_net()
    optimizer = optim.AdamW(net.parameters(), weight_decay=0.1)
    random_step(net, optimizer)
    bare = optimizer.state_dict()
    for group in bare["param_groups"]:
        group.pop("decoupled_weight_decay", None)
    state, _ = match_optimizer(bare, list(net.named_parameters()))
    assert "does not name its class" in optimizer_settings(state, shapes_of(net)).problem
    named = optimizer_settings(state, shapes_of(net), optimizer_options("adamw"))
    one = named.parameters["0.weight"]
    assert (named.problem, named.kind, one.decoupled, one.weight_decay, one.step) == ("", "adamw", True, 0.1, 1)


def test_options_come_before_the_state() -> None:
    net = double_net()
    optimizer = optim.Adam(net.parameters(), lr=0.1)
    random_step(net, optimizer)
    assert settled(net, optimizer, lr=0.5).parameters["0.bias"].lr == 0.5
    other = settled(net, optimizer, kind="sgd", lr=0.5, momentum=0.9)
    assert (other.kind, other.problem, other.parameters["0.bias"].momentum) == ("sgd", "", 0.9)
    assert "no sum of" in settled(net, optimizer, kind="adagrad", lr=0.5).problem
    assert "learning rate is not known" in settled(net, optimizer, kind="sgd").problem


def test_options_alone() -> None:
    shapes = shapes_of(double_net())
    assert optimizer_settings(None, shapes) is None
    found = optimizer_settings(None, shapes, optimizer_options("sgd:lr=0.1,momentum=0.9,nesterov"))
    assert found.label == "SGD, lr 0.1, momentum 0.9 (Nesterov)"
    assert "no exp_avg_sq" in optimizer_settings(None, shapes, optimizer_options({"kind": "adam", "lr": 1e-3})).problem
    assert "--damping" in optimizer_settings(None, shapes, optimizer_options("kfac:lr=1")).problem
    known = optimizer_settings(None, shapes, optimizer_options("k-fac:lr=1,damping=0.01,flavour=reduce"))
    assert (known.problem, known.damping, known.label) == ("", 0.01, "K-FAC, lr 1, damping 0.01, reduce")
    both = optimizer_options({"kind": "kfac:lr=1,flavour=reduce", "lr": 2.0, "damping": 0.1})
    assert both == {"kind": "kfac", "lr": 2.0, "flavour": "reduce", "damping": 0.1}
    assert "name it with --optimizer" in optimizer_settings(None, shapes, optimizer_options("lr=0.1")).problem


@pytest.mark.parametrize(
    "words",
    ["lion:lr=1", "sgd:lr=-1", "sgd:lr=nan", "sgd:beta1=1", "sgd:rate=1", "kfac:flavour=both", "sgd:nesterov=x"],
)
def test_options_that_name_nothing(words: str) -> None:
    with pytest.raises(UsageError):
        optimizer_options(words)


SHAMPOO = {
    "L and R": {"L": torch.eye(5), "R": torch.eye(4)},
    "numbered": {"precond_0": torch.eye(5), "precond_1": torch.eye(4)},
    "inverse": {"inv_precond_0": torch.eye(5), "inv_precond_1": torch.eye(4), "precond_0": torch.eye(5)},
    "inverse, other": {"inv_pre_cond_0": torch.eye(5), "inv_pre_cond_1": torch.eye(4)},
    "distributed": {"block_0": {"shampoo": {"factor_matrices": [torch.eye(5), torch.eye(4)]}}},
    "list": {"factor_matrices": [torch.eye(5), torch.eye(4)]},
    "preconditioners": {"preconditioners": [torch.eye(5), torch.eye(4)]},
    "unknown": {"buckets": [torch.eye(5)]},
    "other size": {"L": torch.eye(3), "R": torch.eye(4)},
}


@pytest.mark.parametrize("form", SHAMPOO)
def test_shampoos_factors(form: str) -> None:
    state = OptimizerState(
        "Shampoo",
        ("0.weight",),
        {"state": {0: SHAMPOO[form]}, "param_groups": [{"lr": 0.1, "epsilon": 1e-3, "params": [0]}]},
    )
    found = optimizer_settings(state, {"0.weight": (5, 4)})
    assert found.kind == "shampoo"
    if form in ("unknown", "other size", "numbered", "distributed"):
        assert "no factors" in found.problem
    else:
        assert found.problem == ""
        name = "inverse" if form.startswith("inverse") else "factor"
        assert set(found.parameters["0.weight"].moments) == {f"{name}_0", f"{name}_1"}


def test_momentum_that_shampoo_preconditions_again_is_not_assessed() -> None:
    group = {"lr": 0.1, "momentum": 0.5, "epsilon": 1e-3, "params": [0]}
    for form, refused in (("inverse", True), ("inverse, other", True), ("L and R", False)):
        state = OptimizerState("Shampoo", ("0.weight",), {"state": {0: SHAMPOO[form]}, "param_groups": [group]})
        assert (
            "goes through the preconditioner again" in optimizer_settings(state, {"0.weight": (5, 4)}).problem
        ) == refused


class Shampoo(optim.Optimizer):
    """A reference on matrices: L += g g^T, R += g^T g, step -lr L^p g R^p; `numbered` as torch_optimizer does."""

    def __init__(self, params: Iterable[Any], lr: float, epsilon: float, numbered: bool) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.0, "weight_decay": 0.0, "epsilon": epsilon, "update_freq": 1})
        self.numbered, self.frozen = numbered, False

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                entry, eps = self.state[p], 0.0 if self.numbered else group["epsilon"]
                keys = [f"precond_{k}" for k in (0, 1)] if self.numbered else ["L", "R"]
                for key, square, size in zip(keys, (p.grad @ p.grad.T, p.grad.T @ p.grad), p.shape, strict=True):
                    start = group["epsilon"] * torch.eye(size).double() if self.numbered else 0 * square
                    if not self.frozen:
                        entry[key] = entry.get(key, start) + square
                roots = []
                for k, key in enumerate(keys):
                    values, U = torch.linalg.eigh(entry[key] + eps * torch.eye(len(entry[key])).double())
                    roots.append((U * values ** (-1 / 2 if self.numbered else -1 / 4)) @ U.T)
                    if self.numbered:
                        entry[f"inv_precond_{k}"] = roots[-1]
                p -= group["lr"] * roots[0] @ p.grad @ roots[1]


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("times", [0.7, 1.3])
def test_growth_under_a_reference_shampoo(numbered: bool, times: float) -> None:
    """Along the top direction of a quadratic whose Hessian is dense, with frozen factors."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    H = root @ root.T
    weight = nn.Parameter(torch.zeros(5, 4).double())
    model = nn.Module()
    model.weight = weight
    optimizer = Shampoo([weight], 1.0, 0.1, numbered)
    for _ in range(8):
        weight.grad = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        optimizer.step()
    optimizer.frozen = True

    def linearised(lr: float) -> Preconditioner:
        optimizer.param_groups[0]["lr"] = lr
        settings = settled(model, optimizer)
        assert settings.problem == ""
        P = preconditioner(settings, ["weight"])
        assert isinstance(P, Preconditioner)
        return P

    def rooted(P: Preconditioner) -> Tensor:
        units = torch.eye(20).double().view(20, 5, 4)
        return torch.stack([P.inverse_root({"weight": unit})["weight"].flatten() for unit in units], 1)

    R = rooted(linearised(1.0))
    values, vectors = torch.linalg.eigh(R @ H @ R)
    lr = times * 2 / float(values[-1])
    with torch.no_grad():
        weight.copy_((R @ vectors[:, -1]).view(5, 4))
    sizes = [float(weight.detach().norm())]
    for _ in range(3):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = (H @ weight.detach().flatten()).view(5, 4)
        optimizer.step()
        sizes.append(float(weight.detach().norm()))
    predicted = linearised(lr).step.growth(float(values[-1]))
    assert sizes[1:] == pytest.approx([sizes[0] * predicted**k for k in (1, 2, 3)], rel=1e-9)
    assert (predicted > 1) == (times > 1)


@pytest.mark.parametrize("agrees", [True, False])
def test_scheduler_and_clipping_are_told(agrees: bool, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1)
    random_step(net, optimizer)
    scheduler.step()
    if not agrees:
        optimizer.param_groups[0]["lr"] = 0.3
    torch.save(
        {
            "model": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": scheduler.state_dict(),
            "hyper_parameters": {"gradient_clip_val": 2},
        },
        tmp_path / "c.pt",
    )
    state = load_checkpoint(
        tmp_path / "c.pt", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    ).optimizer
    assert state.clip == 2.0
    assert (state.schedule.name, state.schedule.problem == "") == ("StepLR", agrees)
    assert ("is not the optimizer's" in state.schedule.problem) != agrees
    settings = optimizer_settings(state, shapes_of(net))
    assert settings.label.endswith("gradient norm clipped at 2")
    # what the user says comes first
    own = optimizer_settings(state, shapes_of(net), optimizer_options({"clip_norm": 0, "lr": 0.5}))
    assert (own.clip, own.schedule) == (None, None)
    assert "what its StepLR does is left out" in own.notes[0]


CLIPS: dict[str, tuple[dict[str, Any], float | None, bool]] = {
    "top": ({"max_grad_norm": 0.5}, 0.5, False),
    "hyperparameters": ({"hyper_parameters": {"gradient_clip_val": 1.5}}, 1.5, False),
    "namespace": ({"args": argparse.Namespace(grad_clip=0.25)}, 0.25, False),
    "off": ({"max_grad_norm": 0.0}, None, False),
    "by value": ({"hparams": {"gradient_clip_val": 1.5, "gradient_clip_algorithm": "value"}}, None, True),
    "value of its own": ({"clip_value": 0.1}, None, True),
    "a flag": ({"grad_clip": True}, None, False),
}


@pytest.mark.parametrize("name", CLIPS)
def test_the_bound_on_the_gradient(name: str) -> None:
    content, bound, told = CLIPS[name]
    found, notes = find_clip(content)
    assert found == bound
    assert any("not modelled" in note for note in notes) == told


def test_a_class_told_from_nadams_options() -> None:
    net = double_net()
    state, _ = match_optimizer(optim.NAdam(net.parameters()).state_dict(), list(net.named_parameters()))
    assert state.class_name == "NAdam"


def test_an_unknown_class_named_by_the_user_keeps_its_numbers() -> None:
    groups = [{"lr": 0.25, "momentum": 0.5, "params": [0]}]
    state = OptimizerState(
        "Muon", ("0.weight",), {"state": {0: {"L": torch.eye(5), "R": torch.eye(4)}}, "param_groups": groups}
    )
    assert "no stability threshold is known for Muon" in optimizer_settings(state, {"0.weight": (5, 4)}).problem
    named = optimizer_settings(state, {"0.weight": (5, 4)}, optimizer_options("shampoo:damping=0.1"))
    assert (named.problem, named.damping) == ("", 0.1)
    assert (named.parameters["0.weight"].lr, named.parameters["0.weight"].momentum) == (0.25, 0.5)


VARIANTS: dict[str, Callable[[Iterable[Any]], optim.Optimizer]] = {
    "fused": lambda p: optim.AdamW(p, lr=0.01, fused=True),
    "capturable": lambda p: optim.Adam(p, lr=torch.tensor(0.01, dtype=torch.float64), foreach=False),
    "foreach": lambda p: optim.NAdam(p, lr=0.01, foreach=True),
    "rmsprop foreach": lambda p: optim.RMSprop(p, lr=0.01, foreach=True),
    "amsgrad fused": lambda p: optim.Adam(p, lr=0.01, amsgrad=True, fused=True),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_flags_of_the_implementation_change_nothing(name: str, tmp_path: Path) -> None:
    """Tensor steps and rates, through a file and matched by order: the predicted step is torch's."""
    net = double_net()
    optimizer = VARIANTS[name](net.parameters())
    for _ in range(3):
        random_step(net, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    state, _ = match_optimizer(torch.load(tmp_path / "o.pt", weights_only=True), list(net.named_parameters()))
    settings = optimizer_settings(state, shapes_of(net))
    assert settings.problem == ""
    assert settings.parameters["0.weight"].step == 3
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    predicted = next_update(settings, before, random_step(net, optimizer))
    for key, p in net.named_parameters():
        real = p.detach() - before[key]
        assert float((predicted[key] - real).abs().max()) <= 1e-10 * float(real.abs().max()), key


NAMED: dict[str, Callable[[Iterable[Any]], optim.Optimizer]] = {
    "Muon": lambda p: optim.Muon([one for one in p if one.ndim == 2]),
    "Adafactor": lambda p: optim.Adafactor(p),
    "ASGD": lambda p: optim.ASGD(p),
    "Rprop": lambda p: optim.Rprop(p),
    "LBFGS": lambda p: optim.LBFGS(p),
}


@pytest.mark.parametrize("name", NAMED)
def test_others_are_named_and_not_assessed(name: str) -> None:
    net = double_net()
    optimizer = NAMED[name](net.parameters())
    assert class_name_of(optimizer.state_dict())[0] == name
    found = settled(net, optimizer)
    assert (found.kind, found.name) == ("other", name)
    assert found.problem == f"no stability threshold is known for {name}"


OPTIONS = {
    "ScheduleFree": {"lr": 1, "betas": (0.9, 0.99), "eps": 1e-8, "r": 0, "k": 3, "weight_lr_power": 2},
    "AdEMAMix": {"lr": 1, "betas": (0.9, 0.99, 0.9999), "eps": 1e-8, "alpha": 5.0, "beta3_warmup": 9},
    "Prodigy": {"lr": 1, "betas": (0.9, 0.99), "d0": 1e-6, "d_coef": 1.0},
    "LARS": {"lr": 1, "momentum": 0.9, "dampening": 0, "nesterov": False, "trust_coefficient": 1e-3},
    "Lion": {"lr": 1, "betas": (0.9, 0.99), "weight_decay": 0.1},
    "Sophia": {"lr": 1, "betas": (0.9, 0.99), "rho": 0.04, "weight_decay": 0.1},
    "FusedAdam": {"lr": 1, "betas": (0.9, 0.99), "eps": 1e-8, "bias_correction": True, "weight_decay": 0.1},
    "unknown": {"lr": 1, "betas": (0.9, 0.99), "eps": 1e-8, "delta": 0.1, "wd_ratio": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_others(name: str) -> None:
    assert class_name_of({"state": {}, "param_groups": [{**OPTIONS[name], "params": [0]}]})[0] == name


def test_an_sgd_with_options_of_its_own_is_not_taken_for_torchs() -> None:
    group = {**optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9).state_dict()["param_groups"][0]}
    assert class_name_of({"state": {}, "param_groups": [group]}) == ("SGD", ())
    name, notes = class_name_of({"state": {}, "param_groups": [{**group, "caution": True}]})
    assert name == "unknown"
    assert "caution" in notes[0]


LIKE_ADAM = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False, "params": [0]}
MOMENTS_OF_ADAM = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
LOOK_ALIKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "Adam": ({}, {}, "Adam"),
    "Adam with tags": ({"group_name": "decay", "lr_scale": 0.5, "initial_lr": 0.1}, {}, "Adam"),
    "AdaBelief": ({"buffer": [[None] * 3] * 10}, {"exp_avg_var": torch.ones(2)}, "AdaBelief"),
    "a switch of its own": ({"caution": True}, {}, "unknown"),
    "a tensor of its own": ({}, {"exp_avg_slow": torch.ones(2)}, "unknown"),
    "8-bit": (
        {},
        {"state1": torch.ones(2, dtype=torch.uint8), "state2": torch.ones(2, dtype=torch.uint8)},
        "bitsandbytes",
    ),
    "Adamax": ({}, {"exp_inf": torch.ones(2)}, "Adamax"),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_what_looks_like_adam_is_not_taken_for_it(name: str) -> None:
    options, tensors, expected = LOOK_ALIKES[name]
    found = {"state": {0: {**MOMENTS_OF_ADAM, **tensors}}, "param_groups": [{**LIKE_ADAM, **options}]}
    state, notes = match_optimizer(found, [("w", torch.zeros(2))])
    settings = optimizer_settings(state, {"w": (2,)})
    assert state.class_name == expected
    assert (settings.problem == "") == (expected == "Adam")
    assert (expected == "unknown") == any("looks like Adam but" in note for note in notes)


def test_quantized_moments_are_told() -> None:
    found = {
        "state": {0: {**MOMENTS_OF_ADAM, "exp_avg_sq": torch.ones(2).to(torch.uint8)}},
        "param_groups": [LIKE_ADAM],
    }
    state, _ = match_optimizer(found, [("w", torch.zeros(2))])
    assert "exp_avg_sq is quantized (uint8)" in optimizer_settings(state, {"w": (2,)}).problem


def test_another_packages_adam_is_not_torchs() -> None:
    net = double_net()
    others = type("AdamW", (optim.AdamW,), {"__module__": "quantized.optim"})
    settings = settled(net, others(net.parameters()))
    assert (settings.kind, settings.problem) == ("other", "no stability threshold is known for AdamW of quantized")
    own = type("Mine", (optim.AdamW,), {})
    assert settled(net, own(net.parameters())).kind == "other"


SCHEDULED: dict[str, tuple[tuple[int, ...], int, float, bool]] = {
    "one": ((0,), 1, 0.2, True),
    "two on one optimizer": ((0, 0), 1, 0.2, False),
    "one for each of two": ((1, 0), 2, 0.2, True),
    "two of the same rate": ((1, 0), 2, 0.05, False),
}


@pytest.mark.parametrize("case", SCHEDULED)
def test_several_schedulers(case: str) -> None:
    """Lightning's lists: the scheduler of the optimizer's own rates, and none where several may act on it."""
    of, count, other, known = SCHEDULED[case]
    nets = [double_net() for _ in range(2)]
    optimizers = [optim.SGD(net.parameters(), lr=lr) for net, lr in zip(nets, (0.1, other), strict=True)]
    warm_up = optim.lr_scheduler.LinearLR(optimizers[0], 0.5, total_iters=10)
    before = [optim.lr_scheduler.StepLR(optimizers[one], 5) for one in of[:-1]]
    content = {
        "lr_schedulers": [one.state_dict() for one in (*before, warm_up)],
        "optimizer_states": [one.state_dict() for one in optimizers[:count]],
    }
    state, _ = match_optimizer(content["optimizer_states"][0], list(nets[0].named_parameters()))
    state = with_surroundings(state, content)
    assert (state.schedule.problem == "") == known
    assert state.schedule.name == ("LinearLR" if known else "several schedulers")
    assert known or "2 schedulers" in state.schedule.problem
    assert any("2 optimizers" in note for note in state.notes) == (count == 2)
