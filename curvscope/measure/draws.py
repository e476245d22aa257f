"""Inner products between the blocks of single draws, and those of what approximates them."""

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
    gram = block.gram * draws
    products = gram.view(draws, examples, draws, examples).square().sum((1, 3))
    return products, gram.diagonal().view(draws, examples).sum(1)


def diagonal_pairs(block: Block) -> Float64[Tensor, "K K"]:
    """<diag G_i, diag G_j>, a slice of the columns at a time."""
    draws, examples = block.columns.count, block.columns.examples
    total = torch.zeros(draws, draws, dtype=torch.float64, device=block.device)
    for _, _, piece in block.slices():
        diagonal = piece.view(draws, examples, -1).square().sum(1) * draws
        total += diagonal @ diagonal.T
    return total


def some_draws(block: Block, which: Sequence[int]) -> Block:
    """The block of some of the draws, scaled to estimate G with them alone."""
    columns, chosen = block.columns, list(which)
    scale = (columns.count / len(chosen)) ** 0.5
    part = dataclasses.replace(
        columns,
        count=len(chosen),
        gradients=None if columns.gradients is None else columns.gradients[chosen] * scale,
        values=None if columns.values is None else columns.values[chosen] * scale,
    )
    return Block(part, block.d_out, block.d_in, block.piece_bytes)


def rotated(block: Block, U_B: Float64[Tensor, "d_out d_out"], U_A: Float64[Tensor, "d_in d_in"]) -> Block:
    """The block in the basis U_B (x) U_A, its columns `U_B^T V U_A` in float64."""
    columns = block.columns
    if columns.values is not None:
        turned = dataclasses.replace(columns, values=U_B.T @ columns.values.double() @ U_A)
    else:
        assert columns.inputs is not None and columns.gradients is not None
        turned = dataclasses.replace(
            columns, inputs=columns.inputs.double() @ U_A, gradients=columns.gradients.double() @ U_B
        )
    return Block(turned, block.d_out, block.d_in, block.piece_bytes)


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
    for k in range(columns.count):
        single = dataclasses.replace(
            columns,
            count=1,
            gradients=None if columns.gradients is None else columns.gradients[k : k + 1],
            values=None if columns.values is None else columns.values[k : k + 1],
        )
        yield Block(single, block.d_out, block.d_in, block.piece_bytes)
