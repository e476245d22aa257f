"""Sick networks and their healthy twins: one known fault each, on the digits, for measuring what diagnosis is worth.

A twin pair shares program, seed, data and schedule; the sick one has one fault, of the first of its strengths unless
that is asked otherwise. Whether the fault really harms is not taken from its label: `outlook` and `long_outlook` run
the real optimizer on from the checkpoint, and `verdict` compares the twins.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from sample_models.zoo_programs import KFAC, PROGRAMS, Optimizer, Program, make_optimizer

BATCH = 64
OUTLOOK = 40
LONG_OUTLOOK = 200
REFRESH = 5
POISONED = 3
KFAC_LR = 0.03
KFAC_DAMPING = 0.1
EVERY = ("mlp", "cnn", "transformer", "recurrent", "residual")


class Data(Protocol):
    """What a program learns from: the digits, or anything that lies like them."""

    @property
    def train_images(self) -> Tensor:
        """Inputs, examples first."""

    @property
    def train_labels(self) -> Tensor:
        """Classes from 0."""


@dataclass
class Case:
    """What a fault may change; the first `BATCH` of the images are those that are analyzed."""

    program: Program
    model: nn.Module
    optimizer: Optimizer
    images: Tensor
    labels: Tensor
    layer: str
    strength: float


Change = Callable[[Case], None]


@dataclass(frozen=True)
class Fault:
    """One fault: what it does and how long both twins train before the checkpoint.

    Attributes:
        name: of the fault.
        programs: where it can exist.
        steps: training steps of both twins.
        start: changes the sick one before the training.
        end: changes it at the checkpoint.
        both: changes both at the checkpoint, before `end`.
        cure: changes the healthy one at the checkpoint, after `both`.
        rate: both train at so many times the program's rate.
        data: changes the sick one's images from the start.
        optimizer: "adam" or "kfac" for both, where it is not the program's own.
        norms: both twins train at the rate for norms; the sick one has none.
        damping: the sick one's, for K-FAC.
        strengths: how many times what is struck is changed, the weakest first, where the fault has a size.
        local: whether one layer is to blame.
    """

    name: str
    programs: tuple[str, ...]
    steps: int
    start: Change | None = None
    end: Change | None = None
    both: Change | None = None
    cure: Change | None = None
    rate: float = 1.0
    data: Callable[[Tensor], Tensor] | None = None
    optimizer: str = ""
    norms: bool = False
    damping: float = KFAC_DAMPING
    strengths: tuple[float, ...] = (1.0,)
    local: bool = False


@dataclass
class Specimen:
    """One network at a checkpoint: model, optimizer, batch, and what was done to it.

    `layer` is the struck one, "" where the whole network is; `judged` [BATCH] tells the examples that harm is read off;
    `stream` are all images and labels that training goes on with, the batch the first of them.
    """

    program: str
    fault: str
    seed: int
    sick: bool
    layer: str
    model: nn.Module
    optimizer: Optimizer
    images: Tensor
    labels: Tensor
    judged: Tensor
    stream: tuple[Tensor, Tensor]
    strength: float = 1.0

    @property
    def given_optimizer(self) -> Optimizer | str:
        """The optimizer as `curvscope.analyze` takes it: K-FAC in words, as torch.optim has none."""
        if not isinstance(self.optimizer, KFAC):
            return self.optimizer
        settings = self.optimizer.param_groups[0]
        return f"kfac:lr={settings['lr']},damping={settings['damping']}"


def twin(data: Data, program_name: str, fault_name: str, seed: int, *, sick: bool, strength: float = 0.0) -> Specimen:
    """One half of a pair, trained from its seed; equal arguments give equal specimens to the bit.

    `strength` is the fault's, its first by default.
    """
    program, fault = PROGRAMS[program_name], FAULTS[fault_name]
    generator = torch.Generator().manual_seed(seed)
    build = program.build
    if fault.norms:
        assert program.normed is not None and program.unnormed is not None
        build = program.unnormed if sick else program.normed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
    kind = program.optimizer if fault.optimizer in ("", "kfac") else fault.optimizer
    lr = program.lr if kind == program.optimizer else program.adam_lr
    optimizer = make_optimizer(kind, model, program.normed_lr if fault.norms else fault.rate * lr)
    images = fault.data(data.train_images) if sick and fault.data else data.train_images
    order = torch.randperm(len(images), generator=generator)
    layer = struck(program, fault, seed)
    strength = strength or fault.strengths[0]
    case = Case(program, model, optimizer, images[order], data.train_labels[order], layer, strength)
    _apply(fault.start if sick else None, case)
    model.train()
    for _ in range(fault.steps):
        chosen = BATCH + torch.randint(len(order) - BATCH, (BATCH,), generator=generator)
        _step(case, case.images[chosen], case.labels[chosen])
    model.eval()
    _apply(fault.both, case)
    _apply(fault.end if sick else fault.cure, case)
    if fault.optimizer == "kfac":
        case.optimizer = KFAC(model, KFAC_LR, fault.damping if sick else KFAC_DAMPING)
    judged = torch.arange(BATCH) != POISONED
    where = layer if sick else ""
    stream = case.images, case.labels
    batch = stream[0][:BATCH].clone(), stream[1][:BATCH].clone()
    return Specimen(
        program_name, fault_name, seed, sick, where, model, case.optimizer, *batch, judged, stream, strength
    )


def healthy_key(program: str, fault_name: str, seed: int) -> tuple[object, ...]:
    """Equal for two faults whose healthy twins are the same network at the same checkpoint."""
    fault = FAULTS[fault_name]
    optimizer = fault.optimizer or PROGRAMS[program].optimizer
    return program, seed, fault.steps, optimizer, fault.norms, fault_name if fault.both else ""


def struck(program: Program, fault: Fault, seed: int) -> str:
    """The layer that the fault strikes; "" where it is the whole network's."""
    if fault.name == "attention_logits":
        return f"blocks.{seed % 2}.self_attn"
    if fault.name == "saturated_outputs":
        return program.last
    if fault.name == "recurrent_weight":
        return "rnn.weight_hh_l0"
    return program.layers[seed % len(program.layers)] if fault.local else ""


def outlook(specimen: Specimen, steps: int = OUTLOOK) -> list[float]:
    """The losses of the judged examples while the real optimizer goes on from the checkpoint on the whole batch.

    In eval mode; K-FAC takes its factors anew every `REFRESH` steps. Model and optimizer of the specimen stay as they
    are. It ends early where the loss is no longer finite.
    """
    return _losses(specimen, steps, lambda: (specimen.images, specimen.labels))


def long_outlook(specimen: Specimen, steps: int = LONG_OUTLOOK) -> list[float]:
    """The same while training goes on: on batches drawn from all of the specimen's data, equal ones for twins."""
    generator = torch.Generator().manual_seed(specimen.seed)
    images, labels = specimen.stream

    def draw() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        return images[chosen], labels[chosen]

    return _losses(specimen, steps, draw)


def _losses(specimen: Specimen, steps: int, draw: Callable[[], tuple[Tensor, Tensor]]) -> list[float]:
    """The judged examples' mean loss before each step, and after the last."""
    model, optimizer = copy.deepcopy((specimen.model, specimen.optimizer))
    losses: list[float] = []
    for step in range(steps + 1):
        with torch.no_grad():
            each = nn.functional.cross_entropy(model(specimen.images), specimen.labels, reduction="none")
        losses.append(each[specimen.judged].mean().item())
        if not (math.isfinite(losses[-1]) and bool(each.isfinite().all())):
            break
        images, labels = draw()
        if isinstance(optimizer, KFAC) and step % REFRESH == 0:
            try:
                optimizer.refresh(images)
            except torch.linalg.LinAlgError:
                losses[-1] = math.nan
                break
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return losses


def verdict(losses: list[float], healthy: list[float]) -> str:
    """What became of a run, in one word, beside its healthy twin's (which may be itself).

    "diverges": the loss is not finite, or ends (mean of its last eighth) over 1.2 times its start, by 0.05 at least.
    "spikes": it was over twice its beginning, by 0.1 at least, and over twice the twin's highest.
    "stalls": it ends over twice the twin's end, by 0.1 at least.
    "trains": none of these.
    """
    if not math.isfinite(losses[-1]):
        return "diverges"
    end, expected = _end(losses), _end(healthy)
    if end > max(1.2 * losses[0], losses[0] + 0.05):
        return "diverges"
    if max(losses) > max(2 * losses[0], losses[0] + 0.1) and (losses is healthy or max(losses) > 2 * max(healthy)):
        return "spikes"
    return "stalls" if end > max(2 * expected, expected + 0.1) else "trains"


def _end(losses: list[float]) -> float:
    last = losses[-max(1, len(losses) // 8) :]
    return sum(last) / len(last)


def _apply(change: Change | None, case: Case) -> None:
    if change is not None:
        with torch.no_grad():
            change(case)


def _step(case: Case, images: Tensor, labels: Tensor) -> None:
    case.optimizer.zero_grad()
    nn.functional.cross_entropy(case.model(images), labels).backward()
    case.optimizer.step()


def _weight(case: Case) -> nn.Parameter:
    owner, _, last = case.layer.rpartition(".")
    module = case.model.get_submodule(owner if last.startswith("weight") else case.layer)
    return getattr(module, last if last.startswith("weight") else "weight")  # type: ignore[no-any-return]


def _scale_weight(case: Case) -> None:
    _weight(case).mul_(case.strength)


def _dead(case: Case) -> None:
    case.model.get_submodule(case.layer).bias.fill_(-20.0)  # type: ignore[union-attr, operator]


def _group_lr(case: Case) -> None:
    weight = _weight(case)
    for group in case.optimizer.param_groups:
        if any(p is weight for p in group["params"]):
            group["lr"] *= case.strength


def _poison(case: Case) -> None:
    case.images[POISONED] *= 100.0
    case.labels[POISONED] = (case.labels[POISONED] + 5) % (case.labels.max() + 1)


def _blow_attention(case: Case) -> None:
    attention = case.model.get_submodule(case.layer)
    width = attention.embed_dim
    attention.in_proj_weight[: 2 * width] *= 100.0  # type: ignore[index, operator]


def _shift(case: Case) -> None:
    """Images moved to the right by an eighth of their width."""
    case.images = case.images.roll(2, -1)


def _converged(case: Case) -> None:
    """The second moments that a run leaves whose gradients have long been a thousandth of what they were."""
    for state in case.optimizer.state.values():
        state["exp_avg_sq"] *= 1e-6


def _warm_moments(case: Case) -> None:
    """The moments see the shifted data, while the weights stay."""
    with torch.enable_grad():
        rates = [group["lr"] for group in case.optimizer.param_groups]
        for group in case.optimizer.param_groups:
            group["lr"] = 0.0
            group["betas"] = (0.9, 0.9)
        for _ in range(60):
            _step(case, case.images[:BATCH], case.labels[:BATCH])
        for group, rate in zip(case.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
            group["betas"] = (0.9, 0.999)


def _set(**values: float) -> Change:
    def change(case: Case) -> None:
        for group in case.optimizer.param_groups:
            for key, value in values.items():
                if key in ("beta1", "beta2"):
                    betas = list(group["betas"])
                    betas[int(key[-1]) - 1] = value
                    group["betas"] = tuple(betas)
                else:
                    group[key] = value

    return change


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("group_lr", EVERY, 60, end=_group_lr, strengths=(10.0, 100.0), local=True),
        Fault("init", EVERY, 0, start=_scale_weight, strengths=(8.0, 30.0), local=True),
        Fault("dead_units", ("mlp", "cnn", "residual"), 20, start=_dead, local=True),
        Fault("unscaled_inputs", EVERY, 2, data=lambda images: 100.0 * images + 100.0),
        Fault("poisoned_example", EVERY, 60, end=_poison),
        Fault("attention_logits", ("transformer",), 60, end=_blow_attention, local=True),
        Fault("no_norm", ("cnn", "transformer", "residual"), 10, norms=True),
        Fault("stale_moments", EVERY, 60, rate=3.0, both=_shift, end=_converged, cure=_warm_moments, optimizer="adam"),
        Fault("adam_eps", EVERY, 20, start=_set(eps=1.0), optimizer="adam"),
        Fault("adam_beta2", EVERY, 20, start=_set(beta2=0.1), optimizer="adam"),
        Fault("recurrent_weight", ("recurrent",), 20, start=_scale_weight, strengths=(6.0,), local=True),
        Fault("saturated_outputs", EVERY, 60, end=_scale_weight, strengths=(30.0,), local=True),
        Fault("kfac_damping_small", ("mlp", "cnn", "residual"), 60, optimizer="kfac", damping=1e-5),
        Fault("kfac_damping_large", ("mlp", "cnn", "residual"), 60, optimizer="kfac", damping=1e3),
    )
}
