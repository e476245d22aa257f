"""The programs of the zoo, the fifth written when all rules stood, and the small K-FAC that some of its faults need."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sample_models.data import CLASSES

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
    """Four convolutions with ReLU, each with its norm where there are norms, then the mean and a head."""

    def __init__(self, norms: bool = False) -> None:
        super().__init__()
        widths = (1, 8, 16, 24, 24)
        self.convs = nn.ModuleList(
            nn.Conv2d(d_in, d_out, 3, stride=1 + (index < 3), padding=1)
            for index, (d_in, d_out) in enumerate(itertools.pairwise(widths))
        )
        for conv in self.convs:
            _he(conv)
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) if norms else nn.Identity() for width in widths[1:])
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10]."""
        x = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """Three residual blocks x + W relu(V norm(x)) on 30 measures, pre-norm, for two classes."""

    def __init__(self, norms: bool = True, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Linear(30, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width) if norms else nn.Identity(),
                nn.Linear(width, 2 * width),
                nn.ReLU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(3)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, measures: Tensor) -> Tensor:
        """Logits [N, 2]."""
        x = self.stem(measures)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class _NoNorm(nn.Identity):
    """Stands for a LayerNorm that was left out: nn.TransformerEncoderLayer fuses nothing where two eps differ."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps


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
                block.norm1, block.norm2 = _NoNorm(0.0), _NoNorm(1.0)  # type: ignore[assignment]
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def mlp() -> nn.Sequential:
    """256-64-64-32-10 with ReLU, from He's initialisation."""
    widths = (256, 64, 64, 32)
    layers: list[nn.Module] = [nn.Flatten()]
    for d_in, d_out in itertools.pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
        _he(layers[-2])
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


def _he(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)


@dataclass(frozen=True)
class Program:
    """A network with the optimizer and the rates that train it well, and the layers that faults strike.

    Attributes:
        name: of the program.
        build: the network; its weights come from the global random state.
        layers: struck one a seed.
        optimizer: "sgd" (momentum 0.9), "adam" or "adamw".
        lr: its learning rate.
        adam_lr: Adam's, for faults of Adam's own settings.
        last: the layer that gives the logits.
        normed, unnormed: the network with and without norms, for that fault.
        normed_lr: a learning rate that trains the network with norms.
    """

    name: str
    build: Callable[[], nn.Module]
    layers: tuple[str, ...]
    optimizer: str
    lr: float
    adam_lr: float
    last: str
    normed: Callable[[], nn.Module] | None = None
    unnormed: Callable[[], nn.Module] | None = None
    normed_lr: float = 0.0


PROGRAMS = {
    program.name: program
    for program in (
        Program("mlp", mlp, ("1", "3", "5"), "sgd", 0.07, 3e-3, "7"),
        Program(
            "cnn",
            Convolutional,
            ("convs.0", "convs.1", "convs.2"),
            "sgd",
            0.06,
            3e-3,
            "head",
            lambda: Convolutional(True),
            Convolutional,
            0.15,
        ),
        Program(
            "transformer",
            Attention,
            ("blocks.0.linear1", "blocks.1.linear1", "blocks.1.linear2"),
            "adam",
            3e-3,
            3e-3,
            "head",
            Attention,
            lambda: Attention(False),
            1e-2,
        ),
        Program("recurrent", Recurrent, ("rnn.weight_ih_l0", "rnn.weight_hh_l0", "head"), "adam", 5e-3, 5e-3, "head"),
        Program(
            "residual",
            Residual,
            ("blocks.0.1", "blocks.1.1", "blocks.2.1"),
            "adamw",
            3e-3,
            3e-3,
            "head",
            Residual,
            lambda: Residual(False),
            1e-2,
        ),
    )
}


class KFAC(Optimizer):
    """K-FAC-expand on linear layers and convolutions, the reference: W -= lr (B (x) A + damping I)^{-1} grad.

    The factors are those of the GGN of the softmax cross-entropy, exact over the classes, of the batch last given to
    `refresh`; they stay frozen in between. Parameters of other layers stay fixed. Source: arXiv:1503.05671.
    """

    def __init__(self, model: nn.Module, lr: float, damping: float) -> None:
        super().__init__(model.parameters(), {"lr": lr, "damping": damping})
        self.model = model
        self.layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        self.bases: list[tuple[Tensor, Tensor, Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "model": self.model, "layers": self.layers, "bases": self.bases}

    def refresh(self, images: Tensor) -> None:
        """Take the factors anew from the model on these images."""
        inputs: dict[nn.Module, Tensor] = {}
        outputs: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            inputs[module], outputs[module] = given[0].detach(), out

        hooks = [layer.register_forward_hook(keep) for layer in self.layers]
        logits = self.model(images)
        for hook in hooks:
            hook.remove()
        p = logits.detach().softmax(1)
        sums = [torch.zeros(len(layer.weight), len(layer.weight), dtype=torch.float64) for layer in self.layers]
        for chosen in range(p.shape[1]):
            unit = torch.eye(p.shape[1])[chosen].expand_as(p)
            root = p[:, chosen : chosen + 1].sqrt() * (unit - p)
            gradients = torch.autograd.grad(logits, [outputs[one] for one in self.layers], root, retain_graph=True)
            for total, gradient in zip(sums, gradients, strict=True):
                rows = gradient.flatten(2).transpose(1, 2).reshape(-1, len(total)) if gradient.ndim > 2 else gradient
                total += rows.double().T @ rows.double()
        self.bases = []
        for layer, B in zip(self.layers, sums, strict=True):
            rows = _input_rows(layer, inputs[layer]).double()
            A = rows.T @ rows / len(rows)
            lam_A, U_A = torch.linalg.eigh(A)
            lam_B, U_B = torch.linalg.eigh(B / len(images))
            self.bases.append((U_B, U_A, torch.outer(lam_B.clamp(min=0), lam_A.clamp(min=0))))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step with the factors of the last `refresh`."""
        settings = self.param_groups[0]
        for layer, (U_B, U_A, eigenvalues) in zip(self.layers, self.bases, strict=True):
            assert layer.weight.grad is not None and layer.bias is not None and layer.bias.grad is not None
            gradient = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1).double()
            turned = U_B.T @ gradient @ U_A / (eigenvalues + settings["damping"])
            step = (settings["lr"] * U_B @ turned @ U_A.T).to(layer.weight.dtype)
            layer.weight -= step[:, :-1].reshape_as(layer.weight)
            layer.bias -= step[:, -1]


def _input_rows(layer: nn.Module, given: Tensor) -> Tensor:
    """The rows that a layer's weight multiplies, with the bias's 1."""
    if isinstance(layer, nn.Conv2d):
        unfolded = nn.functional.unfold(given, layer.kernel_size, padding=layer.padding, stride=layer.stride)  # type: ignore[arg-type]
        given = unfolded.transpose(1, 2).flatten(0, 1)
    return torch.cat([given, given.new_ones(len(given), 1)], 1)


def make_optimizer(kind: str, model: nn.Module, lr: float) -> Optimizer:
    """The optimizer of that kind, with one group a parameter, as faults strike single groups."""
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    if kind == "adam":
        return torch.optim.Adam(groups, lr=lr)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)
