"""The sample networks.

Each is a factory's result, so `--model sample_models.models:digits_vit` opens a plain state_dict of it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from sample_models.data import ALPHABET, CLASSES, CONTEXT, IMAGE_SIZE


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


def digits_autoencoder() -> nn.Sequential:
    """The autoencoder 64-128-64-16-64-128-64 with tanh: pixels [N, 64] in, their logits [N, 64] out."""
    widths = [64, 128, 64, 16, 64, 128]
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 64))


class CausalBlock(nn.Module):
    """Pre-norm attention to what came before, then two linear layers; queries, keys and values have their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [N, T, width]."""
        normed = self.norm1(x)
        q, k, v = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class TextGpt(nn.Module):
    """Characters and learned positions, two causal blocks, a norm and a linear head."""

    def __init__(self, width: int = 32, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), width)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(CausalBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET), bias=False)

    def forward(self, characters: Tensor) -> Tensor:
        """Characters [N, T] in, logits [N, T, C] of the next ones out."""
        x = self.characters(characters) + self.positions[: characters.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def text_gpt() -> TextGpt:
    """The text sample."""
    return TextGpt()


class GraphConvolution(nn.Module):
    """A linear layer, then the mean over neighbours and oneself in the symmetric scale of arXiv:1609.02907."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        """Node features [n, d_in] to [n, d_out]."""
        source, target = edge_index
        degree = torch.ones_like(x[:, 0]).index_add(0, target, edge_weight)
        scale = degree.rsqrt()
        x = self.linear(x)
        messages = x[source] * (scale[source] * edge_weight * scale[target]).unsqueeze(1)
        return (x / degree.unsqueeze(1)).index_add(0, target, messages)


class GraphGnn(nn.Module):
    """Members as one-hot vectors, two graph convolutions, the mean over each graph's nodes and a linear head."""

    def __init__(self, members: int = 34, width: int = 16, classes: int = 2) -> None:
        super().__init__()
        self.members = members
        self.conv1 = GraphConvolution(members, width)
        self.conv2 = GraphConvolution(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, member: Tensor, edge_index: Tensor, edge_weight: Tensor, batch: Tensor) -> Tensor:
        """Logits [graphs, 2] for members [n], edges [2, e] and the graph [n] of every node."""
        x = nn.functional.one_hot(member, self.members).to(edge_weight.dtype)
        x = torch.relu(self.conv1(x, edge_index, edge_weight))
        x = torch.relu(self.conv2(x, edge_index, edge_weight))
        graphs = int(batch.max()) + 1
        nodes = torch.ones_like(x[:, :1])
        sums, counts = (t.new_zeros(graphs, t.shape[1]).index_add(0, batch, t) for t in (x, nodes))
        return self.head(sums / counts)


def graph_gnn() -> GraphGnn:
    """The graph sample."""
    return GraphGnn()
