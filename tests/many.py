"""Comparing whole runs number by number, and networks and data that are cut into batches in several ways."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

NUMBERS = ("rel_frobenius", "cosine", "trace_ratio", "rel_spectral")


def gaps(one: Any, other: Any) -> dict[tuple[str, ...], float]:
    """Relative differences of every number of two runs; EKFAC's are left out where they are not unique."""
    assert list(one.layers) == list(other.layers)
    found: dict[tuple[str, ...], float] = {
        ("loss",): _gap(one.model.loss, other.model.loss),
        ("gradient",): _gap(one.model.gradient_norm, other.model.gradient_norm),
    }
    for name, layer in one.layers.items():
        again = other.layers[name]
        for flavour, factors in layer.factors.items():
            found[name, flavour, "A"] = _gap(factors.A, again.factors[flavour].A)
            found[name, flavour, "B"] = _gap(factors.B, again.factors[flavour].B)
        for approximation, row in layer.errors.items():
            assert row.status == again.errors[approximation].status, (name, approximation)
            if approximation.startswith("ekfac") and repeats(layer.factors.get(approximation.removeprefix("ekfac_"))):
                continue
            for key in NUMBERS:
                # where K-FAC is exact its error is rounding
                pair = getattr(row, key), getattr(again.errors[approximation], key)
                found[name, approximation, key] = _gap(*pair, least=1e-3)
        if "ggn" in layer.spectrum:
            count = min(len(layer.spectrum["ggn"]), len(again.spectrum["ggn"]))
            found[name, "spectrum"] = _gap(layer.spectrum["ggn"][:count], again.spectrum["ggn"][:count])
        assert layer.row.examples == again.row.examples
        assert math.isclose(layer.row.positions, again.row.positions)
        assert math.isclose(layer.row.padded, again.row.padded, abs_tol=1e-12)
        assert layer.row.columns == again.row.columns
    return found


def _gap(one: Any, other: Any, least: float = 1e-300) -> float:
    a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (one, other))
    assert a.shape == b.shape
    if a.numel() == 0 or bool(a.isnan().all() and b.isnan().all()):
        return 0.0
    return float((a - b).abs().max() / max(float(a.abs().max()), least))


def repeats(factors: Any) -> bool:
    """Whether a factor has equal eigenvalues: EKFAC's basis is then arbitrary."""
    for factor in (factors.A, factors.B) if factors is not None else ():
        if factor.ndim == 1:
            continue  # an embedding's: its basis are the tokens
        values = torch.linalg.eigvalsh(torch.as_tensor(factor, dtype=torch.float64))
        gaps = values.diff(dim=-1) / values.abs().amax(-1, keepdim=True)
        if gaps.numel() and float(gaps.min()) < 1e-9:
            return True
    return False


def worst(one: Any, other: Any) -> float:
    """The largest difference, spectral ones (which an iteration finds) aside."""
    return max(value for key, value in gaps(one, other).items() if key[-1] != "rel_spectral")


class Tokens(nn.Module):
    """One attention block over padded tokens; the outputs are [N, T, C]."""

    def __init__(self, classes: int = 4, d: int = 6, length: int = 6, vocabulary: int = 7) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, d)
        self.position = nn.Parameter(0.1 * torch.randn(length, d))
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.tokens(ids) + self.position[: ids.shape[1]]
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask[:, None, :], -1e9).softmax(-1)
        return self.head(torch.tanh(x + self.out(weights @ v)))


def tokens(examples: int = 6, length: int = 6, classes: int = 4, vocabulary: int = 7) -> tuple[Any, Tensor]:
    """Ids, masks of unequal lengths, and a class for every token that is real."""
    ids = torch.randint(vocabulary, (examples, length))
    lengths = torch.tensor([length, 3, 4, 2, length, 5, 3, 4][:examples])
    mask = torch.arange(length)[None] < lengths[:, None]
    targets = torch.randint(classes, (examples, length)).masked_fill(~mask, -100)
    return {"ids": ids, "mask": mask}, targets


def cut(batch: tuple[Any, Any], sizes: list[int]) -> list[tuple[Any, Any]]:
    """The batch as several, of these sizes."""
    inputs, targets = batch
    pairs, low = [], 0
    for size in sizes:
        part = slice(low, low + size)
        own = {name: value[part] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[part]
        pairs.append((own, targets[part]))
        low += size
    return pairs
