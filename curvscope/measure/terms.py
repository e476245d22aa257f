"""A layer's factors as the Kronecker products over its columns' own shape, whatever they are stored as.

One product a flavour, or one a role of a weight used in several; an embedding's diagonal A over the tokens that occur.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.kronecker import Kronecker
from curvscope.curvature.summed import KroneckerSum
from curvscope.extract.collector import Extract
from curvscope.measure.draws import singly

FLAVOURS = ("expand", "reduce")
NO_EKFAC = "the sum of two roles' Kronecker products has no eigenbasis of Kronecker form"


@dataclass(frozen=True)
class Term:
    """One role's factors of one flavour, as matrices over the layer's columns.

    A [width, width] and B [d_out, d_out] are the role's own. `flipped` says that the role uses the transpose: in the
    layer's orientation its product is A (x) B, and they have each other's sizes. `draws` [K, ., .] are B of every draw
    alone, where there are any. With groups A and B have a leading axis of groups, and `draws` a second one.
    """

    role: str
    A: Tensor
    B: Tensor
    flipped: bool
    draws: Tensor | None
    positions: float

    def of_group(self, group: int) -> Term:
        """One group's term; the term itself where there are no groups."""
        if self.A.ndim == 2:
            return self
        draws = None if self.draws is None else self.draws[:, group]
        return replace(self, A=self.A[group], B=self.B[group], draws=draws)

    def traces(self, count: int) -> Tensor:
        """The traces [K] of the products of single draws, each scaled to estimate the whole, over all groups."""
        of_A = self.A.double().diagonal(dim1=-2, dim2=-1).sum(-1)
        of_B = self.scaled_draws(count).diagonal(dim1=-2, dim2=-1).sum(-1)
        return (of_B * of_A).reshape(count, -1).sum(1)

    def scaled_draws(self, count: int) -> Tensor:
        """The B of every draw, scaled to estimate B alone, float64; the exact one as often where it is that."""
        if self.draws is None:
            return self.B.double().expand(count, *self.B.shape)
        return self.draws.double() * count

    @property
    def product(self) -> Kronecker:
        """The term in the layer's orientation."""
        return Kronecker(self.B, self.A) if self.flipped else Kronecker(self.A, self.B)


def terms(extract: Extract) -> dict[str, list[Term]]:
    """Flavour -> its terms; empty for layers without factors."""
    roles: Mapping[str, Extract] = extract.roles or {"": extract}
    found: dict[str, list[Term]] = {}
    for name, role in roles.items():
        for flavour, (A, B) in role.factors.items():
            whole = role.spec.d_in if extract.roles else None
            matrix = _matrix(A, role.tokens, whole) if role.tokens is not None else A
            flipped = extract.spec.roles.get(name, False)
            term = Term(name, matrix, B, flipped, role.probe_B.get(flavour), role.positions)
            found.setdefault(flavour, []).append(term)
    return found


def product(given: Sequence[Term]) -> Kronecker | KroneckerSum:
    """The approximation that the terms of one flavour make."""
    return given[0].product if len(given) == 1 else KroneckerSum([term.product for term in given])


def _matrix(A: Tensor, tokens: Tensor, whole: int | None) -> Tensor:
    """An embedding's A, stored as a vector [V] or as [U, U] over `tokens`, as a matrix [U, U] or [V, V]."""
    if A.ndim == 1:
        return torch.diag(A if whole is not None else A[tokens])
    if whole is None:
        return A
    full = A.new_zeros(whole, whole)
    full[tokens.unsqueeze(1), tokens] = A
    return full


def draw_products(given: Sequence[Term], block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """<G_i, M_j>, <M_i, M_j> [K, K] and tr M_i [K] of single draws, for M the sum of the terms.

    Each draw is scaled to estimate G alone. Only B depends on the draw (not even that where it is exact); in a flipped
    term it stands where A does in the others.
    """
    draws, count = list(singly(block)), block.columns.count
    scaled = [(term, term.A.double(), term.scaled_draws(count)) for term in given]
    GM = MM = torch.zeros(count, count, dtype=torch.float64, device=block.device)
    trace = torch.zeros(count, dtype=torch.float64, device=block.device)
    for term, A, B in scaled:
        contracted = [draw.contract_outputs(A) if term.flipped else draw.contract_inputs(A) for draw in draws]
        GM = GM + torch.einsum("iab,jab->ij", torch.stack(contracted) * count, B)
        trace = trace + B.diagonal(dim1=1, dim2=2).sum(1) * A.trace()
        for other, A2, B2 in scaled:
            if other.flipped == term.flipped:
                MM = MM + torch.einsum("iab,jab->ij", B, B2) * (A * A2).sum()
            else:
                MM = MM + torch.outer((B * A2).sum((1, 2)), (B2 * A).sum((1, 2)))
    return GM, MM, trace
