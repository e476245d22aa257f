"""Sums of X^T X by upper blocks of rows: torch has no symmetric rank-k product on the CPU.

With b blocks (1 + 1/b)/2 of the full product's work is done.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Below this size the product is one block: nothing is saved by its symmetry.
ONE_BLOCK = 128


class GramSum:
    """The running sum of X^T X over pieces X [rows, n], in X's dtype; into `out` [n, n] where that is given."""

    def __init__(self, size: int, *, dtype: torch.dtype, device: torch.device, out: Tensor | None = None) -> None:
        self.sum = torch.empty(size, size, dtype=dtype, device=device) if out is None else out
        self.edges = _edges(size, device)
        self.started = False

    def add(self, piece: Float[Tensor, "rows n"]) -> None:
        """Add X^T X of one piece [rows, n]; any strides."""
        for low, high in zip(self.edges[:-1], self.edges[1:], strict=True):
            # beta = 0 starts from uninitialised memory: no pass of zeros over a large matrix
            self.sum[low:high, low:].addmm_(piece[:, low:high].T, piece[:, low:], beta=int(self.started))
        self.started = True

    def add_batched(self, pieces: Float[Tensor, "batch rows n"]) -> None:
        """Add X^T X of pieces [b, rows, n] whose rows run along memory, without the copy that joining them takes."""
        product = torch.bmm(pieces.transpose(1, 2), pieces).sum(0)
        self.sum = self.sum.add_(product) if self.started else self.sum.copy_(product)
        self.started = True

    def result(self) -> Float[Tensor, "n n"]:
        """The whole matrix, symmetric to the bit; zeros if nothing was added."""
        if not self.started:
            return self.sum.zero_()
        for low, high in zip(self.edges[:-1], self.edges[1:], strict=True):
            corner = self.sum[low:high, low:high]
            corner.copy_(corner.triu() + corner.triu(1).T)
            # contiguous on both sides: a strided copy of a large matrix is 20 times slower
            self.sum[high:, low:high] = self.sum[low:high, high:].contiguous().T.contiguous()
        return self.sum


class BlockSum:
    """G as its columns come in, in float64: one matrix [n, n], or one of each draw [K, n, n]."""

    def __init__(self, size: int, draws: int, device: torch.device) -> None:
        shape = (draws, size, size) if draws else (size, size)
        self.block = torch.empty(shape, dtype=torch.float64, device=device)
        self.sums = [
            GramSum(size, dtype=torch.float64, device=device, out=out)
            for out in (self.block if draws else [self.block])
        ]

    def add(self, column: int, rows: Float[Tensor, "N n"]) -> None:
        """The columns of all examples of one pass."""
        self.sums[column if len(self.sums) > 1 else 0].add(rows.double())

    def result(self) -> Float[Tensor, "*K n n"]:
        """What there is so far."""
        for each in self.sums:
            each.result()
        return self.block


def gram(piece: Float[Tensor, "rows n"]) -> Float[Tensor, "n n"]:
    """X^T X of one piece [rows, n]."""
    total = GramSum(piece.shape[1], dtype=piece.dtype, device=piece.device)
    total.add(piece)
    return total.result()


def input_gram(rows: Float[Tensor, "rows d_in"], count: float, *, bias: bool) -> Float[Tensor, "d d"]:
    """`(1/count) sum a a^T` over rows [., d_in], with the constant 1 of the bias as last input where there is one."""
    size = rows.shape[1]
    full = rows.new_empty(size + bias, size + bias)
    total = GramSum(size, dtype=rows.dtype, device=rows.device, out=full[:size, :size])
    total.add(rows)
    total.result()
    if bias:
        full[:size, size] = full[size, :size] = rows.sum(0)
        full[size, size] = count
    return full.div_(count)


def _edges(size: int, device: torch.device) -> list[int]:
    """Block boundaries: small blocks would cost more in calls than they save; a GPU wants one call."""
    blocks = 1 if size < ONE_BLOCK or device.type != "cpu" else 2 if size < 256 else 4
    return [round(size * i / blocks) for i in range(blocks + 1)]
