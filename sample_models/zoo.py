"""Sick networks and their healthy twins: one known fault each, on the digits, for measuring what diagnosis is worth.

A twin pair shares program, seed, data and schedule; the sick one has one fault. Whether the fault really harms is not
taken from its label: `outlook` runs the real optimizer on from the checkpoint.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from sample_models.data import CLASSES, Digits

BATCH = 128
STEPS = 150
EARLY = 10
Optimizer = torch.optim.Optimizer


class Recurrent(nn.Module):
    """A tanh RNN over the 16 rows of an image; the last state is read out."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.rnn = nn.RNN(16, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10]."""
        return self.head(self.rnn(images.squeeze(1))[0][:, -1])


class Convolutional(nn.Module):
    """Three strided convolutions, each with its norm where there are norms, then the mean and a head."""

    def __init__(self, norms: bool = True) -> None:
        super().__init__()
        widths = (1, 8, 16, 24)
        self.convs = nn.ModuleList(
            nn.Conv2d(d_in, d_out, 3, stride=2, padding=1) for d_in, d_out in zip(widths, widths[1:], strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) if norms else nn.Identity() for width in widths[1:])
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10]."""
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


class _NoNorm(nn.Identity):
    """Stands for a LayerNorm that was left out; nn.TransformerEncoderLayer compares the two eps."""

    eps = 0.0
    weight = bias = None


class Attention(nn.Module):
    """Two pre-norm attention blocks over the 16 patches of an image."""

    def __init__(self, norms: bool = True, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        if not norms:
            for block in self.blocks:
                block.norm1, block.norm2 = _NoNorm(), _NoNorm()  # type: ignore[assignment]
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def mlp() -> nn.Sequential:
    """256-64-64-32-10 with ReLU."""
    widths = (256, 64, 64, 32)
    layers: list[nn.Module] = [nn.Flatten()]
    for d_in, d_out in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


@dataclass(frozen=True)
class Program:
    """A network with the optimizer and learning rate that train it well, and the layers that faults strike."""

    name: str
    build: Callable[[], nn.Module]
    layers: tuple[str, ...]
    optimizer: str
    lr: float
    unnormed: Callable[[], nn.Module] | None = None


PROGRAMS = {
    program.name: program
    for program in (
        Program("mlp", mlp, ("1", "3", "5"), "sgd", 0.05),
        Program("cnn", Convolutional, ("convs.0", "convs.1", "convs.2"), "sgd", 0.05, lambda: Convolutional(False)),
        Program(
            "transformer",
            Attention,
            ("blocks.0.linear1", "blocks.1.linear1", "blocks.1.linear2"),
            "adam",
            5e-3,
            lambda: Attention(False),
        ),
        Program("recurrent", Recurrent, ("rnn.weight_ih_l0", "rnn.weight_hh_l0", "head"), "adam", 1e-2),
    )
}


@dataclass
class Case:
    """What a fault may change, before training (`stage` "start") and at the checkpoint ("end")."""

    program: Program
    model: nn.Module
    optimizer: Optimizer
    images: Tensor
    labels: Tensor
    layer: str
    generator: torch.Generator


@dataclass(frozen=True)
class Fault:
    """One fault: what it does and what is to be named.

    Attributes:
        name: of the fault; also the cause that a diagnosis should rank first.
        programs: where it can exist.
        start: changes the case before the training.
        end: changes it at the checkpoint.
        data: changes the training images from the start.
        optimizer: the optimizer both twins use, where it is not the program's own.
        steps: training steps of both twins.
        local: whether one layer is to blame.
    """

    name: str
    programs: tuple[str, ...]
    start: Callable[[Case], None] | None = None
    end: Callable[[Case], None] | None = None
    data: Callable[[Tensor], Tensor] | None = None
    optimizer: str = ""
    steps: int = STEPS
    local: bool = True
    unnormed: bool = False
    settings: dict[str, float] = field(default_factory=dict)


def _weight(case: Case) -> nn.Parameter:
    owner, _, last = case.layer.rpartition(".")
    module = case.model.get_submodule(owner if last.startswith("weight") else case.layer)
    return getattr(module, last if last.startswith("weight") else "weight")


def _bias(case: Case) -> nn.Parameter:
    return case.model.get_submodule(case.layer).bias  # type: ignore[return-value]


def _scale_weight(factor: float) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        with torch.no_grad():
            _weight(case).mul_(factor)

    return change


def _dead(case: Case) -> None:
    with torch.no_grad():
        _bias(case).fill_(-8.0)


def _group_lr(case: Case) -> None:
    weight = _weight(case)
    for group in case.optimizer.param_groups:
        if any(p is weight for p in group["params"]):
            group["lr"] *= 10


def _poison(case: Case) -> None:
    case.images[3] *= 100.0
    case.labels[3] = (case.labels[3] + 5) % CLASSES


def _blow_attention(case: Case) -> None:
    attention = case.model.get_submodule(case.layer)
    with torch.no_grad():
        width = attention.embed_dim
        attention.in_proj_weight[: 2 * width] *= 30.0  # type: ignore[index,operator]


def _shift(case: Case) -> None:
    case.images = -3.0 * case.images.flip(-1)
    case.labels = (case.labels + 3) % CLASSES


def _set(**values: float) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        for group in case.optimizer.param_groups:
            for key, value in values.items():
                if key == "beta2":
                    group["betas"] = (group["betas"][0], value)
                else:
                    group[key] = value

    return change


def _saturate(case: Case) -> None:
    with torch.no_grad():
        case.model.get_submodule(_last(case.program)).weight.mul_(30.0)  # type: ignore[operator,union-attr]


def _last(program: Program) -> str:
    return "7" if program.name == "mlp" else "head"


EVERY = ("mlp", "cnn", "transformer", "recurrent")
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("group_lr", EVERY, end=_group_lr),
        Fault("init", EVERY, start=_scale_weight(8.0), steps=1),
        Fault("dead_units", ("mlp", "cnn"), start=_dead, steps=EARLY),
        Fault("unscaled_inputs", EVERY, data=lambda x: 20.0 * x + 20.0, steps=EARLY, local=False),
        Fault("poisoned_example", EVERY, end=_poison, local=False, steps=50),
        Fault("attention_logits", ("transformer",), end=_blow_attention),
        Fault("no_norm", ("cnn", "transformer"), unnormed=True, local=False, steps=EARLY),
        Fault("stale_moments", EVERY, end=_shift, optimizer="adam", local=False),
        Fault("adam_eps", EVERY, end=_set(eps=1.0), start=_set(eps=1.0), optimizer="adam", local=False, steps=EARLY),
        Fault("adam_beta2", EVERY, start=_set(beta2=0.1), optimizer="adam", local=False),
        Fault("recurrent_weight", ("recurrent",), start=_scale_weight(6.0), steps=EARLY),
        Fault("saturated_outputs", EVERY, end=_saturate),
        Fault("kfac_damping_small", ("mlp", "cnn"), optimizer="kfac", settings={"damping": 1e-9}, local=False),
        Fault("kfac_damping_large", ("mlp", "cnn"), optimizer="kfac", settings={"damping": 1e3}, local=False),
    )
}


@dataclass
class Specimen:
    """One network at a checkpoint: model, optimizer, batch, and what was done to it ("" and healthy: nothing)."""

    program: str
    fault: str
    seed: int
    sick: bool
    layer: str
    model: nn.Module
    optimizer: Optimizer
    images: Tensor
    labels: Tensor


def make_optimizer(kind: str, model: nn.Module, lr: float) -> Optimizer:
    """The torch.optim optimizer of that kind with one group a parameter, as faults strike single groups."""
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    if kind == "adam":
        return torch.optim.Adam(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


ADAM_LR = {"mlp": 2e-3, "cnn": 2e-3, "transformer": 2e-3, "recurrent": 2e-3}


def twin(digits: Digits, program_name: str, fault_name: str, seed: int, *, sick: bool) -> Specimen:
    """One half of a pair, trained from its seed; equal arguments give equal specimens to the bit."""
    program, fault = PROGRAMS[program_name], FAULTS[fault_name]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = program.unnormed() if sick and fault.unnormed and program.unnormed else program.build()
    kind = "sgd" if fault.optimizer == "kfac" else fault.optimizer or program.optimizer
    lr = program.lr if kind == program.optimizer else ADAM_LR[program_name]
    optimizer = make_optimizer(kind, model, lr)
    layer = _struck(program, fault, seed)
    images = fault.data(digits.train_images) if sick and fault.data else digits.train_images
    order = torch.randperm(len(images), generator=generator)
    held, rest = order[:BATCH], order[BATCH:]
    case = Case(
        program, model, optimizer, images[held].clone(), digits.train_labels[held].clone(), layer, generator
    )
    if sick and fault.start:
        fault.start(case)
    model.train()
    for _ in range(fault.steps):
        chosen = rest[torch.randint(len(rest), (64,), generator=generator)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), digits.train_labels[chosen]).backward()
        optimizer.step()
    if sick and fault.end:
        fault.end(case)
    model.eval()
    return Specimen(
        program_name, fault_name, seed, sick, layer if sick else "", model, optimizer, case.images, case.labels
    )


def _struck(program: Program, fault: Fault, seed: int) -> str:
    """The layer that the fault strikes; "" where it is the whole network's."""
    if fault.name == "attention_logits":
        return f"blocks.{seed % 2}.self_attn"
    if fault.name == "saturated_outputs":
        return _last(program)
    if fault.name == "recurrent_weight":
        return "rnn.weight_hh_l0"
    return program.layers[seed % len(program.layers)] if fault.local else ""


def outlook(specimen: Specimen, steps: int = 60) -> list[float]:
    """The losses of the batch while the real optimizer goes on from the checkpoint, full batch, in eval mode.

    Model and optimizer of the specimen stay as they are.
    """
    model, optimizer = copy.deepcopy((specimen.model, specimen.optimizer))
    losses = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(specimen.images), specimen.labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        optimizer.step()
    return losses


def verdict(losses: list[float], healthy: list[float]) -> str:
    """What happened, in one word: diverges, stalls or trains, judged against the healthy twin's run."""
    if not math.isfinite(losses[-1]) or max(losses[1:]) > 1.5 * losses[0] + 0.05:
        return "diverges"
    gain, expected = 1 - losses[-1] / losses[0], 1 - healthy[-1] / healthy[0]
    if gain < 0.25 * expected and losses[-1] > 2 * healthy[-1] + 0.05:
        return "stalls"
    return "trains"
