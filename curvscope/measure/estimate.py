"""Errors from a few draws of the block, unbiased and with standard errors.

With K independent draws, Ghat_i and Bhat_i the block and factor of draw i alone (A has no draw in it) and
D_i = Ghat_i - Bhat_i (x) A, `||G - M||^2` is estimated without bias by `sum_{i != j} <D_i, D_j> / (K (K - 1))`;
likewise ||G||^2, <G, M> and ||M||^2. Ratios and roots keep a bias of order 1/K. Standard errors are the delete-one-draw
jackknife of the final number; the 95 % interval takes t with K - 1 degrees of freedom.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.extract.collector import Extract
from curvscope.measure.terms import NO_EKFAC, draw_products, terms
from curvscope.records import NAN, ErrorRow
from curvscope.settings import APPROXIMATIONS

MINIMUM_DRAWS = 4
UNASSESSED = {
    "ekfac_expand": "EKFAC's basis and diagonal from the same draws would be biased",
    "ekfac_reduce": "EKFAC's basis and diagonal from the same draws would be biased",
    "kron_best": "the nearest product to a sum of few draws is biased towards the draws",
}


def estimated_rows(layer: str, fisher: str, extract: Extract, blocks: Sequence[Block]) -> dict[str, ErrorRow]:
    """tables/errors from draws: kfac_* and diag estimated, the others not assessed, each with its reason.

    Inner products of groups' block-diagonal matrices are sums over the groups.
    """
    draws = blocks[0].columns.count
    reason = ""
    if draws < MINIMUM_DRAWS:
        reason = f"{draws} draws give no error bar: take --samples {MINIMUM_DRAWS} or more, or --fisher exact"
    elif sum(block.trace for block in blocks) == 0.0:
        reason = "the block is zero in every draw: no curvature reaches the layer"
    elif blocks[0].columns.form == "formed":
        reason = "the draws of this layer were summed, not kept"
    if reason:
        return {name: ErrorRow(layer, name, fisher, status="not_assessed", reason=reason) for name in APPROXIMATIONS}
    flavours = list(extract.factors or terms(extract))
    names = [*(f"kfac_{flavour}" for flavour in flavours), "diag"]
    pairs = [_pairs(extract, block, i) for i, block in enumerate(blocks)]
    totals = {name: [sum(each) for each in zip(*(pair[name] for pair in pairs), strict=True)] for name in names}
    rows = {name: _row(layer, name, fisher, *totals[name]) for name in names}
    absent = UNASSESSED if flavours else dict.fromkeys(APPROXIMATIONS[:-1], "no Kronecker form")
    if extract.roles:
        absent = absent | dict.fromkeys(("ekfac_expand", "ekfac_reduce"), NO_EKFAC)
    for name, why in absent.items():
        rows[name] = ErrorRow(layer, name, fisher, status="not_assessed", reason=why)
    return {name: rows[name] for name in APPROXIMATIONS}


def _pairs(extract: Extract, block: Block, group: int) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """<G_i, G_j>, <G_i, M_j>, <M_i, M_j> [K, K] and tr G_i, tr M_i [K] of single draws, by approximation."""
    # every draw carries 1/sqrt(K): undo it, so that each alone estimates G
    draws, examples = block.columns.count, block.columns.examples
    gram = block.gram * draws
    GG = gram.view(draws, examples, draws, examples).square().sum((1, 3))
    trace_G = gram.diagonal().view(draws, examples).sum(1)
    diagonals = _per_draw_diagonal(block) * draws
    DD = diagonals @ diagonals.T
    pairs = {"diag": (GG, DD, DD, trace_G, trace_G)}
    if extract.spec.groups == 1:
        each = list(_draws(block))
        for flavour, given in terms(extract).items():
            GM, MM, trace_M = draw_products(given, each)
            pairs[f"kfac_{flavour}"] = (GG, GM, MM, trace_G, trace_M)
        return pairs
    for flavour in extract.factors:
        A = extract.factors[flavour][0][group].double()
        B = extract.probe_B[flavour][:, group].double() * draws
        W = _per_draw_contraction(block, A) * draws
        GM = torch.einsum("iab,jab->ij", W, B)
        MM = torch.einsum("iab,jab->ij", B, B) * A.square().sum()
        trace_M = B.diagonal(dim1=1, dim2=2).sum(1) * A.trace()
        pairs[f"kfac_{flavour}"] = (GG, GM, MM, trace_G, trace_M)
    return pairs


def _row(
    layer: str, name: str, fisher: str, GG: Tensor, GM: Tensor, MM: Tensor, trace_G: Tensor, trace_M: Tensor
) -> ErrorRow:
    draws = GG.shape[0]
    DD = GG - GM - GM.T + MM

    def squared(keep: Tensor) -> float:
        size = _u_statistic(GG, keep)  # an estimate: it may come out zero or negative where ||G|| drowns in noise
        return _u_statistic(DD, keep) / size if size > 0 else NAN

    def relative(keep: Tensor) -> float:
        value = squared(keep)
        return value**0.5 if value > 0 else NAN

    def cosine(keep: Tensor) -> float:
        sizes = _u_statistic(GG, keep) * _u_statistic(MM, keep)
        return _u_statistic(GM, keep) / sizes**0.5 if sizes > 0 else NAN

    def trace_ratio(keep: Tensor) -> float:
        size = float(trace_G[keep].sum())
        return float(trace_M[keep].sum()) / size if size > 0 else NAN

    everything = torch.arange(draws, device=GG.device)
    square, square_error = squared(everything), _jackknife(squared, draws, GG.device)
    error, error_stderr = relative(everything), _jackknife(relative, draws, GG.device)
    status, reason = "estimated", "ratios of estimates keep a bias of order 1/draws"
    if math.isnan(square):
        return ErrorRow(
            layer, name, fisher, status="not_assessed", reason=f"||G|| is indistinguishable from 0 with {draws} draws"
        )
    if square <= 2 * square_error:
        status = "not_assessed" if square <= 0 else "estimated"
        reason = f"rel_frobenius^2 = {square:.2g} +/- {square_error:.2g}: indistinguishable from 0 with {draws} draws"
    return ErrorRow(
        layer,
        name,
        fisher,
        rel_frobenius=error,
        rel_frobenius_stderr=error_stderr,
        cosine=cosine(everything),
        cosine_stderr=_jackknife(cosine, draws, GG.device),
        trace_ratio=trace_ratio(everything),
        trace_ratio_stderr=_jackknife(trace_ratio, draws, GG.device),
        status=status,
        reason=reason,
    )


def _u_statistic(pairs: Tensor, keep: Tensor) -> float:
    """The mean over pairs of different draws."""
    block = pairs[keep][:, keep]
    count = keep.numel()
    return float((block.sum() - block.diagonal().sum()) / (count * (count - 1)))


def _jackknife(statistic: Callable[[Tensor], float], draws: int, device: torch.device) -> float:
    """Delete-one standard error, sqrt((K - 1)/K sum (x_i - mean)^2); NaN where a replicate has no value."""
    everything = torch.arange(draws, device=device)
    replicates = torch.tensor([statistic(everything[everything != i]) for i in range(draws)], dtype=torch.float64)
    return float(((draws - 1) / draws * (replicates - replicates.mean()).square().sum()).sqrt())


def _per_draw_contraction(block: Block, A: Tensor) -> Tensor:
    """sum_n V A V^T of each draw, [K, d_out, d_out]."""
    return torch.stack([draw.contract_inputs(A) for draw in _draws(block)])


def _per_draw_diagonal(block: Block) -> Tensor:
    """Diag of each draw's block, [K, P]."""
    return torch.stack([draw.diagonal.flatten() for draw in _draws(block)])


def _draws(block: Block) -> Iterator[Block]:
    """Each draw's own block, in the form the columns are kept in."""
    columns = block.columns
    for k in range(columns.count):
        single = dataclasses.replace(
            columns,
            count=1,
            gradients=None if columns.gradients is None else columns.gradients[k : k + 1],
            values=None if columns.values is None else columns.values[k : k + 1],
        )
        yield Block(single, block.d_out, block.d_in, block.piece_bytes)
