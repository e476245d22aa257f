"""A layer's factors as the Kronecker products over its columns' own shape, whatever they are stored as.

One product a flavour, or one a role of a weight used in several; an embedding's diagonal A over the tokens that occur.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.kronecker import Kronecker
from curvscope.curvature.summed import KroneckerSum
from curvscope.extract.collector import Extract

FLAVOURS = ("expand", "reduce")
NO_EKFAC = "the sum of two roles' Kronecker products has no eigenbasis of Kronecker form"


@dataclass(frozen=True)
class Term:
    """One role's factors of one flavour, as matrices over the layer's columns.

    A [width, width] and B [d_out, d_out] are the role's own. `flipped` says that the role uses the transpose: in the
    layer's orientation its product is A (x) B, and they have each other's sizes. `draws` [K, ., .] are B of every draw
    alone, where there are any.
    """

    role: str
    A: Tensor
    B: Tensor
    flipped: bool
    draws: Tensor | None
    positions: float

    @property
    def product(self) -> Kronecker:
        """The term in the layer's orientation."""
        return Kronecker(self.B, self.A) if self.flipped else Kronecker(self.A, self.B)


def terms(extract: Extract) -> dict[str, list[Term]]:
    """Flavour -> its terms; empty for layers without factors. Not for groups."""
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


def draw_products(given: Sequence[Term], draws: Sequence[Block]) -> tuple[Tensor, Tensor, Tensor]:
    """<G_i, M_j>, <M_i, M_j> [K, K] and tr M_i [K] of single draws, for M the sum of the terms.

    Each draw is scaled to estimate G alone. Only B depends on the draw; in a flipped term it stands where A does in the
    others.
    """
    count = len(draws)
    scaled = [(term, term.A.double(), term.draws.double() * count) for term in given if term.draws is not None]
    GM = MM = torch.zeros(count, count, dtype=torch.float64, device=draws[0].device)
    trace = torch.zeros(count, dtype=torch.float64, device=draws[0].device)
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
