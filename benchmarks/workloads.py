"""The four networks that are timed, with random weights and one random batch each.

Every weight that is to get factors belongs to an `nn.Linear` or an `nn.Conv2d`, because that is what the peer
supports. All losses are the mean cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """One network and its batch.

    Attributes:
        model: float32, in eval mode; maps `inputs` to logits with the classes on axis 1.
        inputs: [N, ...].
        targets: class numbers, [N] or [N, T].
        fisher: how the loss Hessian's root is taken, in curvscope's words: exact, or mc with one sample.
        columns: backward passes that the factors need: C - 1 for exact, 1 for mc.
    """

    name: str
    model: nn.Module
    inputs: Tensor
    targets: Tensor
    fisher: str
    columns: int

    @property
    def examples(self) -> int:
        return self.inputs.shape[0]

    def to(self, device: str) -> Workload:
        """The same on another device."""
        return replace(
            self,
            model=self.model.to(device),
            inputs=self.inputs.to(device),
            targets=self.targets.to(device),
        )

    def layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """The modules whose weights get factors, by name."""
        return {
            name: module for name, module in self.model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
        }


class ResidualStage(nn.Module):
    """Two 3x3 convolutions beside a 1x1 skip."""

    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, padding=1)
        self.skip = nn.Conv2d(d_in, d_out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.skip(x))


class ResNet(nn.Module):
    """A stem of 16 channels, stages of 16, 32 and 64, mean over positions, a linear head."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stages = nn.Sequential(ResidualStage(16, 16, 1), ResidualStage(16, 32, 2), ResidualStage(32, 64, 2))
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(torch.relu(self.stem(x))).mean((2, 3)))


class Block(nn.Module):
    """A pre-norm transformer block; queries, keys and values are packed in one linear layer."""

    def __init__(self, d: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d)
        self.proj = nn.Linear(d, d)
        self.norm2 = nn.LayerNorm(d)
        self.up = nn.Linear(d, 4 * d)
        self.down = nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches of 4x4, four blocks, mean over the tokens, a linear head."""

    def __init__(self, size: int = 32, d: int = 128, depth: int = 4, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, d, 4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn((size // 4) ** 2, d))
        self.blocks = nn.Sequential(*(Block(d, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class GPT(nn.Module):
    """Token and position tables, four causal blocks, a linear head; logits come out as [N, vocabulary, T]."""

    def __init__(self, vocabulary: int = 512, length: int = 128, d: int = 256, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, d)
        self.position = nn.Parameter(0.02 * torch.randn(length, d))
        self.blocks = nn.Sequential(*(Block(d, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.position
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def mlp() -> Workload:
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))
    return Workload("mlp", model.eval(), torch.randn(256, 784), torch.randint(10, (256,)), "exact", 9)


def resnet() -> Workload:
    inputs, targets = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    return Workload("resnet", ResNet().eval(), inputs, targets, "exact", 9)


def vit() -> Workload:
    inputs, targets = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    return Workload("vit", ViT().eval(), inputs, targets, "exact", 9)


def gpt() -> Workload:
    inputs, targets = torch.randint(512, (4, 128)), torch.randint(512, (4, 128))
    return Workload("gpt", GPT().eval(), inputs, targets, "mc", 1)


def small_gpt(d: int = 32, depth: int = 2, length: int = 32, classes: int = 96, examples: int = 8) -> Workload:
    """Small enough for the exact block: T (C - 1) columns an example, 3,040 backward passes."""
    model = GPT(classes, length, d, depth, heads=4).eval()
    inputs, targets = torch.randint(classes, (examples, length)), torch.randint(classes, (examples, length))
    return Workload("small_gpt", model, inputs, targets, "exact", length * (classes - 1))


WORKLOADS: dict[str, Callable[[], Workload]] = {"mlp": mlp, "resnet": resnet, "vit": vit, "gpt": gpt}


def make(name: str, seed: int = 0) -> Workload:
    """The workload of that name; equal seeds give equal weights and batches."""
    return seeded(WORKLOADS[name], seed)


def seeded(build: Callable[[], Workload], seed: int = 0) -> Workload:
    """What `build` makes, with random numbers of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()
