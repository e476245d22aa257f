"""Why K-FAC errs at a layer: its error as a sum of three matrices, each with one cause.

In the spirit of section 3.1 of Martens and Grosse (arXiv:1503.05671), but exact, for any root of the loss Hessian. Let
i = (n, r) run over the M positions of all examples, m be the mean input, at = a - m, and D = sum_{i, k} g g^T (x) a a^T
the block as it were if positions did not interact. With expand's A and B,

    G - B (x) A = spread + mean + cross,
    mean   = sum_{i, k} g g^T (x) (m at^T + at m^T)      curvature depends on where the input lies along its mean
    spread = sum_{i, k} g g^T (x) at at^T - B (x) (A - m m^T)      curvature depends on the input's deviation
    cross  = G - D                                       positions of one example add up coherently.

For reduce the same with one position an example, (gsum, abar) in place of (g, a); cross then is
sum U W^T + W U^T + W W^T, U = gsum abar^T and W the covariance of g and a over the positions of an example.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.kronecker import Kronecker

# Numbers of a piece of columns times rows that are worked on together, where memory allows.
PIECE = 2**22


@dataclass(frozen=True)
class Split:
    """Shares `<T, E> / ||E||^2` of T = spread, mean, cross in E = G - M; they sum to 1, and may be negative.

    `relative` is ||E|| / ||G||. All shares are NaN where E is 0 to the last digit.
    """

    spread: float
    mean: float
    cross: float
    relative: float


def split_error(
    block: Block,
    kronecker: Kronecker,
    inputs: Float[Tensor, "N R d_in"],
    gradients: Float[Tensor, "K N R d_out"],
    mean: Float[Tensor, " d_in"],
    *,
    inner: float,
) -> Split:
    """The shares of the three causes in K-FAC's error, from the positions' inputs and output gradients.

    Args:
        block: the exact block G.
        kronecker: B (x) A of these very rows.
        inputs: a, with the bias's constant 1 (abar with R = 1 for reduce); padded positions may hold anything, their
            gradients are zero.
        gradients: g (gsum for reduce).
        mean: the mean of the real positions' inputs.
        inner: <G, B (x) A>.

    Sums run in float64, the products in the dtype of the rows. Costs 2 (N K) (N R) P operations.
    """
    a = inputs.flatten(0, 1)
    g = gradients.flatten(1, 2)
    of_G, of_mean = _against_block(block, a, g, mean)
    diagonal_M, mean_M = _against_product(kronecker, a, g, mean, max(1, _numbers(block) // g.shape[-1]))
    size = kronecker.norm**2
    error = block.norm**2 - 2 * inner + size
    diagonal = of_G - diagonal_M  # <D, E>
    from_mean = of_mean - mean_M
    if error == 0.0:  # to the last digit: nothing is there to be shared
        return Split(math.nan, math.nan, math.nan, 0.0)
    cross = (block.norm**2 - inner) - diagonal
    spread = diagonal - from_mean - (inner - size)
    return Split(spread / error, from_mean / error, cross / error, max(error, 0.0) ** 0.5 / block.norm)


def split_flops(columns: int, rows: int, parameters: int) -> float:
    """What `split_error` costs in floating-point operations, for N K columns and N R rows."""
    return 2.0 * columns * rows * parameters


def reduced_rows(inputs: Tensor, gradients: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(abar, gsum) of every example as rows with R = 1; `counts` are the real positions, whose inputs alone count."""
    if counts is None:
        means = inputs.mean(1, keepdim=True)
    else:
        means = inputs.sum(1, keepdim=True) / counts.view(-1, 1, 1).to(inputs.dtype)
    return means, gradients.sum(2, keepdim=True)


def _against_block(block: Block, a: Tensor, g: Tensor, mean: Tensor) -> tuple[float, float]:
    """<D, G> and <mean term, G>: with c = g^T V m and d = g^T V a over all positions and columns, sum d^2 and
    2 sum c (d - c).
    """
    m = mean.to(a.dtype)
    if block.columns.form == "formed":
        return _against_formed(block, a, g, m)
    squares = products = 0.0
    draws, limit = g.shape[0], _numbers(block)
    rows = max(1, limit // (block.d_out * draws))
    for first in range(0, a.shape[0], rows):
        near = a[first : first + rows]
        own = g[:, first : first + rows].permute(1, 2, 0).contiguous()  # [rows, d_out, K]
        step = max(1, min(limit // (near.shape[0] * max(block.d_out, draws)), limit // block.parameters))
        for piece in block.pieces(step):
            V = piece.to(a.dtype)
            turned = (near @ V.permute(2, 0, 1).flatten(1)).unflatten(1, V.shape[:2])  # [rows, c, d_out]
            d = torch.bmm(turned, own)
            c = torch.matmul(V @ m, own)
            squares += float(torch.linalg.vector_norm(d, dtype=torch.float64) ** 2)
            products += float((c * (d - c)).sum(dtype=torch.float64))
    return squares, 2 * products


def _against_product(kronecker: Kronecker, a: Tensor, g: Tensor, mean: Tensor, step: int) -> tuple[float, float]:
    """<D, B (x) A> and <mean term, B (x) A>, `step` positions at a time in float64."""
    A, B, m = kronecker.A, kronecker.B, mean.double()
    toward, constant = A @ m, float(m @ A @ m)
    diagonal = of_mean = 0.0
    for low in range(0, a.shape[0], step):
        rows = a[low : low + step].double()
        turned = torch.zeros(rows.shape[0], dtype=torch.float64, device=a.device)  # sum_k g^T B g of every position
        for draw in g:
            own = draw[low : low + step].double()
            turned += torch.linalg.vecdot(own @ B, own)
        diagonal += float((turned * torch.linalg.vecdot(rows @ A, rows)).sum())
        of_mean += 2 * float((turned * (rows @ toward - constant)).sum())
    return diagonal, of_mean


def _numbers(block: Block) -> int:
    """Numbers that are worked on together: of a slice of the block at most."""
    return max(1, min(PIECE, block.piece_bytes // 8))


def _against_formed(block: Block, a: Tensor, g: Tensor, m: Tensor) -> tuple[float, float]:
    """The same where G itself is kept, [P, P]."""
    squares = products = 0.0
    step = max(1, _numbers(block) // block.parameters)
    for k in range(g.shape[0]):
        for low in range(0, a.shape[0], step):
            rows, own = a[low : low + step].double(), g[k, low : low + step].double()
            u = torch.einsum("ro,ri->roi", own, rows).flatten(1)
            along = torch.einsum("ro,i->roi", own, m.double()).flatten(1)
            Gu, Gm = u @ block.gram, along @ block.gram
            squares += float((u * Gu).sum())
            products += float(((u - along) * Gm).sum())
    return squares, 2 * products
