"""The three sample networks: images [N, 1, 16, 16] in, logits [N, 10] out.

Each is a factory's result, so `--model sample_models.models:digits_vit` opens a plain state_dict of it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from sample_models.data import CLASSES, IMAGE_SIZE


def digits_mlp() -> nn.Sequential:
    """The fully connected network 256-20-20-20-20-20-10 with tanh, as in the figures of arXiv:1503.05671."""
    widths = [IMAGE_SIZE * IMAGE_SIZE, 20, 20, 20, 20, 20]
    layers: list[nn.Module] = [nn.Flatten()]
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 skip that carries the stride."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, channels_out, height / stride, width / stride]."""
        out = self.relu(self.conv1(x))
        out = self.conv2(out)
        out += self.skip(x)
        return self.relu(out)


class DigitsCnn(nn.Module):
    """A stem with BatchNorm, two strided residual blocks, global average pooling and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.block1 = ResidualBlock(8, 16, stride=2)
        self.block2 = ResidualBlock(16, 24, stride=2)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10]."""
        features = self.relu(self.norm(self.stem(images)))
        features = self.block2(self.block1(features))
        return self.head(features.mean(dim=(2, 3)))


def digits_cnn() -> DigitsCnn:
    """The convolutional sample."""
    return DigitsCnn()


class DigitsVit(nn.Module):
    """4x4 patches, learned positions, two pre-norm layers of torch.nn, mean pooling and a linear head."""

    def __init__(self, width: int = 32, depth: int = 2, heads: int = 4, patch: int = 4) -> None:
        super().__init__()
        tokens = (IMAGE_SIZE // patch) ** 2
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, 10]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


def digits_vit() -> DigitsVit:
    """The attention sample."""
    return DigitsVit()
