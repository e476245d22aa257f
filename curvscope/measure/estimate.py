"""Errors from a few draws of the block, unbiased and with standard errors.

With K independent draws, Ghat_i and Bhat_i the block and factor of draw i alone (A has no draw in it) and
D_i = Ghat_i - Bhat_i (x) A, `||G - M||^2` is estimated without bias by `sum_{i != j} <D_i, D_j> / (K (K - 1))`;
likewise ||G||^2, <G, M> and ||M||^2 (where B is exact, every Bhat_i is B). Ratios would be biased by 1/K: the
delete-one-draw jackknife corrects them to 1/K^2, and gives their standard errors (`jackknife.Sums.of`). The 95 %
interval is value +/- t stderr with K - 1 degrees of freedom; how often it holds the exact number: docs/estimates.md.

The jackknife runs on the square of rel_frobenius: a square estimated without some of the draws may be negative, and has
no root. The root's standard error is the longer arm of the square's interval. A square that is not positive itself has
no root either, and is said to be indistinguishable from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.extract.collector import Extract
from curvscope.measure.approximate import blind_roles
from curvscope.measure.draws import block_pairs, diagonal_pairs
from curvscope.measure.ekfac_estimate import MINIMUM_DRAWS as EKFAC_DRAWS
from curvscope.measure.ekfac_estimate import ekfac_pairs, halves
from curvscope.measure.jackknife import Estimate, sums, t_95
from curvscope.measure.terms import FLAVOURS, NO_EKFAC, Term, draw_products, terms
from curvscope.records import NAN, ErrorRow, SpectrumRow
from curvscope.settings import APPROXIMATIONS

MINIMUM_DRAWS = 4
RATIOS = "ratios of estimates keep a bias of order 1/draws^2"
KRON_BEST = "the nearest product to a sum of few draws is biased towards the draws"
# Skewness of K draws' mean trace in the outputs from which on their spread does not tell how far they are off: of 17
# models and certainties the lowest coverage was 90 % or more to here, 87 % at 0.23, 65 % at 0.55 (docs/estimates.md).
MOST_SKEWED = 0.2
EIGENVALUES = "only the trace: the eigenvalues of a sum of few draws are biased"


@dataclass(frozen=True)
class _Products:
    """<G_i, G_j>, <G_i, M_j>, <M_i, M_j> [K, K] and tr G_i, tr M_i [K], of draws each scaled to estimate G alone.

    `doubt` [K, K] is a standard error that <G, M> and <M, M> have beside that of the draws, and `moved` [K] what they
    change by through the eigenbasis where a draw is left out.
    """

    GG: Tensor
    GM: Tensor
    MM: Tensor
    trace_G: Tensor
    trace_M: Tensor
    doubt: Tensor | float = 0.0
    moved: Tensor | float = 0.0

    def __add__(self, other: _Products) -> _Products:
        """Of block-diagonal matrices: inner products and traces add."""
        GM = self.GM + other.GM
        return _Products(
            self.GG + other.GG,
            GM,
            GM if self.GM is self.MM else self.MM + other.MM,
            self.trace_G + other.trace_G,
            self.trace_M + other.trace_M,
            self.doubt + other.doubt,
            self.moved + other.moved,
        )


@dataclass(frozen=True)
class DrawnErrors:
    """tables/errors of one layer from draws, and its better K-FAC: expand, reduce, same, undecided, or "" (unknown)."""

    rows: dict[str, ErrorRow]
    better: str = ""


def estimated_errors(layer: str, fisher: str, extract: Extract, blocks: Sequence[Block]) -> DrawnErrors:
    """K-FAC, EKFAC and diag estimated, what can't be not assessed, each with its reason.

    EKFAC takes `ekfac_estimate.MINIMUM_DRAWS` draws, the others `MINIMUM_DRAWS`. Inner products of groups'
    block-diagonal matrices are sums over the groups.
    """
    draws = blocks[0].columns.count
    reason = no_bars(extract, draws)
    if not reason and sum(block.trace for block in blocks) == 0.0:
        reason = "the block is zero in every draw: no curvature reaches the layer"
    if reason:
        return DrawnErrors(
            {name: ErrorRow(layer, name, fisher, status="not_assessed", reason=reason) for name in APPROXIMATIONS}
        )
    better = ""
    if not terms(extract):
        rows = {
            name: ErrorRow(layer, name, fisher, status="not_assessed", reason="no Kronecker form")
            for name in APPROXIMATIONS
        }
    else:
        rows = {"kron_best": ErrorRow(layer, "kron_best", fisher, status="not_assessed", reason=KRON_BEST)}
        factored = _factored(layer, fisher, extract, blocks)
        rows, better = rows | factored.rows, factored.better
    diagonals = [_diagonal(block) for block in blocks]
    rows["diag"] = _row(layer, "diag", fisher, diagonals, None, RATIOS, _rounding(blocks[0]))
    return DrawnErrors({name: rows[name] for name in APPROXIMATIONS}, better)


def _factored(layer: str, fisher: str, extract: Extract, blocks: Sequence[Block]) -> DrawnErrors:
    """The rows of both K-FACs and both EKFACs, and which K-FAC is better."""
    draws = blocks[0].columns.count
    known = terms(extract)
    exact_B = all(term.draws is None for each in known.values() for term in each)
    folds = None if exact_B else halves(draws)
    basis = (
        "EKFAC in the eigenbasis of the exact factors"
        if exact_B
        else f"EKFAC's eigenbasis is carried on from {draws // 4} and {draws // 2} draws to all there could be, and "
        "the error bar allows for that; its diagonal is from the other draws"
    )
    rounding = _rounding(blocks[0])
    rows: dict[str, ErrorRow] = {}
    products: list[_Products] = []
    for flavour in FLAVOURS:
        kfac, ekfac = f"kfac_{flavour}", f"ekfac_{flavour}"
        if flavour == "reduce" and extract.single:
            # one position an example: both flavours are the same matrix
            for name in (kfac, ekfac):
                rows[name] = replace(rows[name.replace("reduce", "expand")], approximation=name)
            continue
        parts = [[term.of_group(group) for term in known[flavour]] for group in range(len(blocks))]
        each = [_products(block, part) for block, part in zip(blocks, parts, strict=True)]
        products.append(_total(each))
        note = blind_roles(flavour, known)
        rows[kfac] = _row(layer, kfac, fisher, each, None, "; ".join(filter(None, (note, RATIOS))), rounding)
        if extract.roles:
            rows[ekfac] = ErrorRow(layer, ekfac, fisher, status="not_assessed", reason=NO_EKFAC)
            continue
        if folds is not None and draws < EKFAC_DRAWS:
            reason = f"basis and diagonal need draws of their own: take --samples {EKFAC_DRAWS} or more"
            rows[ekfac] = ErrorRow(layer, ekfac, fisher, status="not_assessed", reason=reason)
            continue
        each = [_ekfac(block, part[0], folds) for block, part in zip(blocks, parts, strict=True)]
        rows[ekfac] = _row(layer, ekfac, fisher, each, folds, f"{basis}; {RATIOS}", rounding)
    return DrawnErrors(rows, _better(*products) if len(products) > 1 else "same")


def _better(expand: _Products, reduce: _Products) -> str:
    """The K-FAC with the smaller error, where the difference of their squares, on the same draws, is clear of 0."""
    tables = [expand.GG, expand.GM, expand.MM, reduce.GM, reduce.MM]
    found = sums(tables).of(
        lambda u: torch.where(u[..., 0] > 0, (u[..., 2] - u[..., 4] - 2 * (u[..., 1] - u[..., 3])) / u[..., 0], NAN)
    )
    if found.value != found.value:
        return ""
    if abs(found.value) <= t_95(len(expand.GG) - 1) * found.stderr:
        return "undecided"
    return "expand" if found.value < 0 else "reduce"


def _total(groups: Sequence[_Products]) -> _Products:
    total = groups[0]
    for other in groups[1:]:
        total += other
    return total


def estimated_spectra(layer: str, extract: Extract, blocks: Sequence[Block], scale: float) -> dict[str, SpectrumRow]:
    """The traces of G ("ggn") and of both K-FACs with their standard errors, in the loss's unit; no eigenvalues.

    A trace is a mean over draws, unbiased. It has no standard error where there are fewer than `MINIMUM_DRAWS`, or
    where labels are drawn too rarely. K-FACs whose B is exact are left out.
    """
    draws = blocks[0].columns.count
    refused = no_bars(extract, draws)
    traces: dict[str, Tensor] = {"ggn": sum((block_pairs(block)[1] for block in blocks), torch.zeros(()))}
    for flavour, given in terms(extract).items():
        if any(term.draws is not None for term in given):
            traces[f"kfac_{flavour}"] = torch.stack([term.traces(draws) for term in given]).sum(0)
    rows = {}
    for name, each in traces.items():
        found = Estimate(float(each.mean()), NAN)
        reason = EIGENVALUES
        if refused:
            reason = f"{refused}; {EIGENVALUES}"
        else:
            found = sums([], [each], rounding=_rounding(blocks[0])).of(lambda u: u[..., 0])
        rows[name] = SpectrumRow(
            layer,
            name,
            trace=found.value * scale,
            trace_stderr=found.stderr * scale,
            status="estimated",
            reason=reason,
        )
    return rows


def no_bars(extract: Extract, draws: int) -> str:
    """Why these draws do not tell how far off they are; empty where they do."""
    if draws < MINIMUM_DRAWS:
        gives = "1 draw gives" if draws == 1 else f"{draws} draws give"
        return f"{gives} no error bar: take --samples {MINIMUM_DRAWS} or more, or --fisher exact"
    return _rare_labels(extract, draws)


def _rare_labels(extract: Extract, draws: int) -> str:
    """Why no spread of draws can be trusted: labels drawn rarely carry much of the curvature; empty where none do.

    The trace of a draw's Hessian in the outputs has a known distribution. Where the mean of K of them is skewed, most
    sets of draws lack the labels that matter, agree with each other and lie too low.
    """
    variance, third = extract.draw_moments
    skewness = third / variance**1.5 / draws**0.5 if variance > 0 else 0.0
    if skewness <= MOST_SKEWED:
        return ""
    return (
        f"labels that are drawn rarely carry the curvature (the model is certain of most), and {draws} draws hold too "
        f"few of them to tell their own error (skewness {skewness:.2g}, at most {MOST_SKEWED}): take --fisher probe"
    )


def _rounding(block: Block) -> float:
    """A relative error that sums of columns of that dtype have from rounding alone."""
    return 32 * torch.finfo(block.dtype).eps


def _diagonal(block: Block) -> _Products:
    GG, trace = block_pairs(block)
    DD = diagonal_pairs(block)
    return _Products(GG, DD, DD, trace, trace)


def _products(block: Block, given: Sequence[Term]) -> _Products:
    GG, trace = block_pairs(block)
    GM, MM, trace_M = draw_products(given, block)
    return _Products(GG, GM, MM, trace, trace_M)


def _ekfac(block: Block, term: Term, folds: Sequence[Sequence[int]] | None) -> _Products:
    count = block.columns.count
    pairs = ekfac_pairs(block, term.A.double(), term.scaled_draws(count), folds or [range(count)])
    GG, trace = block_pairs(block)
    return _Products(GG, pairs.settled, pairs.settled, trace, trace, pairs.doubt, pairs.moved)


def _square(u: Tensor) -> Tensor:
    """||G - M||^2 / ||G||^2 of estimates that may come out zero or negative where ||G|| drowns in noise."""
    GG, GM, MM = u[..., 0], u[..., 1], u[..., 2]
    return torch.where(GG > 0, (GG - 2 * GM + MM) / GG, NAN)


def _cosine(u: Tensor) -> Tensor:
    GG, GM, MM = u[..., 0], u[..., 1], u[..., 2]
    return torch.where((GG > 0) & (MM > 0), GM / (GG * MM).sqrt(), NAN)


def _trace_ratio(u: Tensor) -> Tensor:
    return torch.where(u[..., 3] > 0, u[..., 4] / u[..., 3], NAN)


def _row(
    layer: str,
    name: str,
    fisher: str,
    groups: Sequence[_Products],
    folds: Sequence[Sequence[int]] | None,
    reason: str,
    rounding: float,
) -> ErrorRow:
    total = _total(groups)
    traces = [total.trace_G, total.trace_M]
    found = sums([total.GG, total.GM, total.MM], traces, folds, rounding)
    draws = total.GG.shape[0]
    if isinstance(total.moved, Tensor):
        changes = torch.zeros_like(found.without)
        changes[:, 1] = changes[:, 2] = total.moved
        found = found.moved(changes)
    square, cosine = found.of(_square), found.of(_cosine)
    if isinstance(total.doubt, Tensor):
        beyond = sums([total.GG, total.GM + total.doubt, total.MM + total.doubt], traces, folds).whole
        square = _doubted(square, _square, found.whole, beyond)
        cosine = _doubted(cosine, _cosine, found.whole, beyond)
    if square.value != square.value:
        reason = f"||G|| is indistinguishable from 0 with {draws} draws"
        return ErrorRow(layer, name, fisher, status="not_assessed", reason=reason)
    notes = [reason]
    if cosine.value != cosine.value:
        notes.append(f"no cosine: ||M|| is indistinguishable from 0 with {draws} draws")
    if total.GM is total.MM and cosine.value == cosine.value:
        # M is a projection of G: the cosine is the root of 1 - rel_frobenius^2, whose interval is the better one
        cosine = _root(Estimate(1 - square.value, square.stderr), draws)
    half = t_95(draws - 1) * square.stderr
    most = max(square.value + half, 0.0) ** 0.5
    relative = _root(square, draws)
    if square.value <= half:
        words = f"{square.value:.2g} +/- {square.stderr:.2g}"
        bound = f", rel_frobenius below {most:.2g}" if most > 0 else ""
        notes.insert(0, f"rel_frobenius^2 = {words}: indistinguishable from 0 with {draws} draws{bound}")
    same = torch.equal(total.trace_G, total.trace_M)  # by construction
    ratio = Estimate(1.0, 0.0) if same else found.of(_trace_ratio)
    return ErrorRow(
        layer,
        name,
        fisher,
        rel_frobenius=relative.value,
        rel_frobenius_stderr=relative.stderr,
        cosine=cosine.value,
        cosine_stderr=cosine.stderr,
        trace_ratio=ratio.value,
        trace_ratio_stderr=ratio.stderr,
        status="estimated" if square.value > 0 else "not_assessed",
        reason="; ".join(notes),
    )


def _root(square: Estimate, draws: int) -> Estimate:
    """The root of a number, its standard error the longer arm of the number's 95 % interval; none if not positive."""
    if not square.value > 0:
        return Estimate(NAN, NAN)
    t, root = t_95(draws - 1), square.value**0.5
    high, low = (max(square.value + sign * t * square.stderr, 0.0) ** 0.5 for sign in (1, -1))
    return Estimate(root, max(high - root, root - low) / t)


def _doubted(known: Estimate, number: Callable[[Tensor], Tensor], whole: Tensor, beyond: Tensor) -> Estimate:
    """The estimate with what the number changes by, where the sums are `beyond` instead of `whole`, in its error."""
    change = float(number(beyond)) - float(number(whole))
    # where the doubt leaves no number at all, there is none
    return Estimate(known.value, math.hypot(known.stderr, change)) if math.isfinite(change) else Estimate(NAN, NAN)
