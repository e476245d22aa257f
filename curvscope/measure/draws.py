"""Inner products between the blocks of single draws, and those of what approximates them.

A block's draws stand as their columns, or each as its own matrix (a formed block of three axes); every product is the
same from either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.extract.collector import Columns
from curvscope.extract.symmetric import gram


def block_pairs(block: Block) -> tuple[Float64[Tensor, "K K"], Float64[Tensor, " K"]]:
    """<G_i, G_j> and tr G_i of the blocks G_i of single draws, each scaled to estimate G alone."""
    draws, examples = block.columns.count, block.columns.examples
    # every draw carries 1/sqrt(K): undo it
    if block.columns.block is not None:
        flat = block.columns.block.flatten(1)
        return (flat @ flat.T) * draws**2, block.columns.block.diagonal(dim1=1, dim2=2).sum(1) * draws
    gram = block.gram * draws
    products = gram.view(draws, examples, draws, examples).square().sum((1, 3))
    return products, gram.diagonal().view(draws, examples).sum(1)


def diagonal_pairs(block: Block) -> Float64[Tensor, "K K"]:
    """<diag G_i, diag G_j>."""
    return Turned(block).pairs(range(block.columns.count))


class Turned:
    """A block's draws with their inputs turned into a basis U_A, once for any number of bases U_B of the outputs.

    In float64. Without U_A the inputs stand as they are.
    """

    def __init__(self, block: Block, U_A: Float64[Tensor, "d_in d_in"] | None = None) -> None:
        columns = block.columns
        self.block = block
        self.inputs: Tensor | None = None
        if columns.block is not None:
            G = columns.block.view(-1, block.d_out, block.d_in, block.d_out, block.d_in)
            # of every two outputs o, p the diagonal over the inputs: all that bases of the outputs see
            self.values = torch.stack([_inner_diagonal(each, U_A) for each in G])
        elif columns.values is not None:
            self.values = columns.values.double() if U_A is None else columns.values.double() @ U_A
        else:
            assert columns.inputs is not None and columns.gradients is not None
            self.inputs = columns.inputs.double() if U_A is None else columns.inputs.double() @ U_A
            self.values = columns.gradients

    def pairs(self, which: Sequence[int], U_B: Float64[Tensor, "d_out d_out"] | None = None) -> Float64[Tensor, "m m"]:
        """<Lambda_i, Lambda_j> of some of the draws, each scaled to estimate G alone, a slice of the outputs at a time.

        `Lambda_i = diag(U^T G_i U)` with `U = U_B (x) U_A`.
        """
        total = torch.zeros(len(which), len(which), dtype=torch.float64, device=self.block.device)
        for diagonals in self._diagonals(list(which), U_B):
            flat = diagonals.flatten(1)
            total += flat @ flat.T
        return total * self.block.columns.count**2

    def _diagonals(self, which: list[int], U_B: Tensor | None) -> Iterator[Tensor]:
        """Lambda of the draws as they are scaled, [m, o, d_in] for a slice of the outputs."""
        if self.block.columns.block is not None:
            for outputs in self._slices(self.block.d_in):
                yield torch.stack([_outer_diagonal(self.values[k], U_B, outputs) for k in which])
        elif self.inputs is None:
            for outputs in self._slices(self.block.columns.examples * self.block.d_in):
                turned = (
                    self.values[k, :, outputs] if U_B is None else U_B[:, outputs].T @ self.values[k] for k in which
                )
                yield torch.stack([_squares(each) for each in turned])
        else:
            yield from self._of_rows(self.inputs, which, U_B)

    def _of_rows(self, inputs: Tensor, which: list[int], U_B: Tensor | None) -> Iterator[Tensor]:
        gradients = self.values[which].double()  # [m, N, R, d_out]
        gradients = gradients if U_B is None else gradients @ U_B
        if inputs.shape[1] == 1:
            a, g = inputs.squeeze(1).square(), gradients.squeeze(2).square()
            for outputs in self._slices(len(which) * self.block.d_in):
                yield g[..., outputs].transpose(1, 2) @ a
            return
        for outputs in self._slices(inputs.shape[0] * self.block.d_in):
            part = gradients[..., outputs].transpose(2, 3)
            yield torch.stack([_squares(torch.matmul(each, inputs)) for each in part])

    def _slices(self, numbers: int) -> Iterator[slice]:
        """Of the outputs, so many that `numbers` for each of them fit a piece."""
        step = max(1, self.block.piece_bytes // (8 * numbers))
        for low in range(0, self.block.d_out, step):
            yield slice(low, min(self.block.d_out, low + step))


def _squares(columns: Float64[Tensor, "N o i"]) -> Float64[Tensor, "o i"]:
    """The sum of squares over the columns."""
    return torch.linalg.vecdot(columns, columns, dim=0)  # of three axes far faster than vector_norm


def _inner_diagonal(G: Float64[Tensor, "o i o i"], U_A: Float64[Tensor, "i i"] | None) -> Float64[Tensor, "o o i"]:
    """T[o, p, a] = sum_{i,q} U_A[i, a] G[o, i, p, q] U_A[q, a]."""
    if U_A is None:
        return G.diagonal(dim1=1, dim2=3)
    return ((G @ U_A) * U_A[:, None]).sum(1)


def _outer_diagonal(T: Float64[Tensor, "o o i"], U_B: Tensor | None, outputs: slice) -> Float64[Tensor, "b i"]:
    """Lambda[b, a] = sum_{o,p} U_B[o, b] T[o, p, a] U_B[p, b]."""
    if U_B is None:
        return T.diagonal(dim1=0, dim2=1).T[outputs]
    basis = U_B[:, outputs]
    half = (basis.T @ T.flatten(1)).unflatten(1, T.shape[1:])  # [b, p, a]
    return (half * basis.T.unsqueeze(-1)).sum(1)


def factors_of_draws(columns: Columns) -> dict[str, Tensor]:
    """Flavour -> B of each draw alone, [K, d_out, d_out], from the gradients that the columns keep."""
    assert columns.gradients is not None
    reduce = torch.stack([gram(g.sum(1)) for g in columns.gradients])
    single = columns.gradients.shape[2] == 1
    return {
        "expand": reduce if single else torch.stack([gram(g.flatten(0, 1)) for g in columns.gradients]),
        "reduce": reduce,
    }


def singly(block: Block) -> Iterator[Block]:
    """Each draw's own block, its columns as they are scaled."""
    columns = block.columns

    def of(tensor: Tensor | None, k: int) -> Tensor | None:
        return None if tensor is None else tensor[k : k + 1]

    for k in range(columns.count):
        single = dataclasses.replace(
            columns,
            count=1,
            gradients=of(columns.gradients, k),
            values=of(columns.values, k),
            block=of(columns.block, k),
        )
        yield Block(single, block.d_out, block.d_in, block.piece_bytes)
