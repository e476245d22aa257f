"""The tiny models of the test cases, one for every way in which a linear layer can meet its examples."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def mlp(*widths: int, activation: type[nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    """Linear layers "0", "2", ... with activations between them."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def linear_chain(*widths: int) -> nn.Sequential:
    """Linear layers "0", "1", ... with nothing between them."""
    return nn.Sequential(*(nn.Linear(d_in, d_out) for d_in, d_out in pairwise(widths)))


class Pooled(nn.Module):
    """A token-wise body on [N, T, d], the mean (or a scaled sum) over tokens, and a head."""

    def __init__(self, body: nn.Module, head: nn.Module, scale: float | None = None) -> None:
        super().__init__()
        self.body, self.head, self.scale = body, head, scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(h.mean(1) if self.scale is None else self.scale * h.sum(1))


class ResidualCNN(nn.Module):
    """A strided stem and one strided residual block, with in-place ReLU and an in-place residual addition."""

    def __init__(self, channels: int = 3, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, channels, 3, stride=2, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, channels, 1, stride=2, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.conv2(self.relu(self.conv1(x)))
        y += self.skip(x)
        return self.head(self.relu(y).mean((2, 3)))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention on [N, T, d] (or, inside, [T, N, d]), mean over tokens, linear head."""

    def __init__(self, width: int = 4, classes: int = 3, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attn = nn.MultiheadAttention(width, 2, batch_first=batch_first)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y, _ = self.attn(x, x, x, need_weights=False)
        return self.head((x + y).mean(1 if self.batch_first else 0))


class PlainAttention(nn.Module):
    """One head of softmax attention from separate projections q, k, v."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).mT / x.shape[-1] ** 0.5, dim=-1)
        return weights @ self.v(x)


class TokenClassifier(nn.Module):
    """A class for every token: [N, T, d] -> [N, C, T]; attention mixes the tokens unless told not to."""

    def __init__(self, width: int = 3, classes: int = 3, mixing: bool = True) -> None:
        super().__init__()
        self.mix = PlainAttention(width) if mixing else mlp(width, width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.mix(x)).transpose(1, 2)


class SharedTwice(nn.Module):
    """One linear layer applied twice in a row."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.shared = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class SharedUnequally(nn.Module):
    """One linear layer applied to every token and once more to their mean."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.shared = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)).mean(1))))


class Rearranged(nn.Module):
    """Tokens [N, T, d] through a linear layer that sees them in another layout, then mixed and pooled.

    `layout`: second [T, N, d], flat_nt [N*T, d], flat_tn [T*N, d].
    """

    def __init__(self, layout: str, width: int = 3, hidden: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.layout = layout
        self.inner = nn.Linear(width, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        N, T = x.shape[:2]
        if self.layout == "flat_nt":
            h = torch.tanh(self.inner(x.reshape(N * T, -1))).reshape(N, T, -1)
        else:
            h = x.transpose(0, 1)
            h = h.reshape(T * N, -1) if self.layout == "flat_tn" else h
            h = torch.tanh(self.inner(h)).reshape(T, N, -1).transpose(0, 1)
        return self.head((h * h.cumsum(1)).mean(1))


class SecondAxisInput(nn.Module):
    """Takes [T, N, d] itself and gives [N, C]."""

    def __init__(self, width: int = 3, hidden: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x))
        return self.head((h * h.cumsum(0)).mean(0))


class Windowed(nn.Module):
    """[N, H, W, d] cut into 2x2 windows, [N * windows, 4, d]: linear layers and mixing in each; pooled."""

    def __init__(self, width: int = 3, classes: int = 3) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        N, H, W, d = x.shape
        windows = x.view(N, H // 2, 2, W // 2, 2, d).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, d)
        h = torch.tanh(self.inner(windows))
        h = self.outer(torch.softmax(h @ h.mT, dim=-1) @ windows)
        return self.head(torch.tanh(h).reshape(N, -1, d).mean(1))


class MatmulLayer(nn.Module):
    """A weight [d_in, d_out] applied by `@`, by torch.matmul with a bias added after, or by addmm."""

    def __init__(self, d_in: int, d_out: int, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(d_in, d_out) / d_in**0.5)
        if how != "operator":
            self.bias = nn.Parameter(torch.randn(d_out) / d_in**0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "operator":
            return x @ self.weight
        if self.how == "matmul":
            return torch.matmul(x, self.weight) + self.bias
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.weight.shape[1])


class FunctionalLinear(nn.Module):
    """A functional linear with a weight [d_out, d_in], its bias a parameter that is added separately."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in) / d_in**0.5)
        self.bias = nn.Parameter(torch.randn(d_out) / d_in**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight) + self.bias


class TwoWeights(nn.Module):
    """A module that owns two weights, so that their layers are named by the parameters."""

    def __init__(self, width: int = 3, hidden: int = 4) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(hidden, width) / width**0.5)
        self.w_out = nn.Parameter(torch.randn(width, hidden) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(functional.linear(x, self.w_in)), self.w_out)


class Mixer(nn.Module):
    """An MLP-mixer block: one linear layer mixes the positions of each channel, another the channels."""

    def __init__(self, tokens: int = 4, width: int = 3, classes: int = 3) -> None:
        super().__init__()
        self.tokens = nn.Linear(tokens, tokens)
        self.channels = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + functional.gelu(self.tokens(x.transpose(1, 2))).transpose(1, 2)
        return self.head(functional.gelu(self.channels(x)).mean(1))


class MaskedPool(nn.Module):
    """Tokens [N, T, d] pooled over the real ones only, as `mask` [N, T] tells: padding has zero gradient."""

    def __init__(self, width: int = 3, hidden: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.inner(x))
        share = (mask / mask.sum(1, keepdim=True)).to(h.dtype)
        pooled = (h * h * share.unsqueeze(-1)).sum(1)
        return self.head(pooled), pooled


class TextLike(nn.Module):
    """Two keyword inputs and a dict of outputs, as Hugging Face models have them."""

    def __init__(self, width: int = 3, hidden: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.left = nn.Linear(width, hidden)
        self.right = nn.Linear(width, hidden, bias=False)
        self.head = nn.Linear(hidden, classes)

    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.left(first) + self.right(second))
        return {"logits": self.head(hidden), "hidden": hidden}


class FramewiseConv(nn.Module):
    """One convolution on every frame of [N, frames, C, H, W], frames folded into the batch, then pooled."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2, stride=2)
        self.head = nn.Linear(3, classes)

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.tanh(self.conv(x.flatten(0, 1))).mean((2, 3)).unflatten(0, x.shape[:2])
        return self.head((frames * frames.cumsum(1)).mean(1))


class PooledCNN(nn.Module):
    """Convolutions with nothing between them, global average pooling, a head."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, **settings)
        self.conv2 = nn.Conv2d(3, 2, 3, **settings)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.conv1(x)).mean((2, 3)))


class EncoderLayer(nn.Module):
    """torch.nn's own transformer block, pooled; its fused inference path must not hide the layers."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(width, 2, dim_feedforward=5, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


class TokenModel(nn.Module):
    """Attention under a mask (real tokens, or the past) and an output for every token, laid out as `layout` says.

    `layout`: first [N, T, C], second [T, N, C], flat_nt [N*T, C], flat_tn [T*N, C].
    """

    def __init__(self, width: int = 3, classes: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, classes)
        self.causal = causal
        self.layout = "first"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = self.q(x) @ self.k(x).mT
        if self.causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
        outputs = self.head(torch.softmax(scores, dim=-1) @ self.v(x))
        if self.layout in ("second", "flat_tn"):
            outputs = outputs.transpose(0, 1)
        return outputs.flatten(0, 1) if self.layout.startswith("flat") else outputs
