"""Sums of X^T X by upper blocks of rows: torch has no symmetric rank-k product on the CPU.

With b blocks (1 + 1/b)/2 of the full product's work is done.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GramSum:
    """The running sum of X^T X over pieces X [rows, n], in X's dtype."""

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.sum = torch.zeros(size, size, dtype=dtype, device=device)
        self.edges = _edges(size, device)

    def add(self, piece: Tensor) -> None:
        """Add X^T X of one piece [rows, n]; any strides."""
        for low, high in zip(self.edges[:-1], self.edges[1:], strict=True):
            self.sum[low:high, low:].addmm_(piece[:, low:high].T, piece[:, low:])

    def result(self) -> Tensor:
        """The whole symmetric matrix; only the upper triangle was accumulated."""
        upper = self.sum.triu()
        return upper + upper.triu(1).T


def gram(piece: Tensor) -> Tensor:
    """X^T X of one piece [rows, n]."""
    total = GramSum(piece.shape[1], dtype=piece.dtype, device=piece.device)
    total.add(piece)
    return total.result()


def _edges(size: int, device: torch.device) -> list[int]:
    """Block boundaries: small blocks would cost more in calls than they save; a GPU wants one call."""
    blocks = 1 if size < 128 or device.type != "cpu" else 2 if size < 256 else 4
    return [round(size * i / blocks) for i in range(blocks + 1)]
