"""Signs that one layer's factors, rows and columns show: dead or mean-dominated inputs, noise, outliers, condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.extremes import extremes
from curvscope.extract.collector import Extract
from curvscope.measure.drawn_signs import RESOLVED, TOP_DIRECTION, Draws, condition_of_B, dead_outputs, position_share
from curvscope.measure.factor_estimate import FactorOfDraws
from curvscope.measure.rows_kept import Rows, rows_of
from curvscope.measure.signs import missing, sign_row
from curvscope.measure.sources import LEAST_ERROR
from curvscope.records import ErrorRow, ExampleRow, StabilityRow

# Examples listed of a layer.
LISTED = 5
UNEQUAL = "positions do not stand for the same thing in every example"
# Positions are compared where there are at least this many.
LEAST_POSITIONS = 4
# Examples are compared where there are at least this many: an equal share is then a quarter of what is told.
LEAST_EXAMPLES = 8
OF_TOKENS = "an embedding's inputs are tokens, which have no size"


def layer_signs(
    extract: Extract,
    blocks: Sequence[Block],
    errors: Mapping[str, ErrorRow],
    seed: int,
    draws: Draws | None = None,
    drawn_B: FactorOfDraws | None = None,
) -> tuple[list[StabilityRow], list[ExampleRow]]:
    """The layer's rows of tables/stability that need what the sweep extracted, and its rows of tables/examples.

    `draws` says how its columns were drawn, where they were: then what rests on them has an error, or is not assessed.
    `drawn_B` are the eigenvalues of expand's B of them, where they are known.
    """
    name = extract.spec.name
    rows = _factor_rows(extract, draws, drawn_B)
    if extract.example_squares is not None and extract.gradient is not None:
        squared = float(extract.gradient.double().square().sum())
        rows += noise_rows(extract.example_squares, squared, layer=name)
    if extract.spec.exact_only:
        return rows, []
    rows.append(_limit(extract, errors))
    kept = rows_of(extract)
    rows.append(_positions(extract, kept, draws))
    shares = TOP_DIRECTION if draws is not None else top_shares(extract, blocks, kept, seed)
    if isinstance(shares, str):
        return [*rows, missing("example_share", shares, layer=name)], []
    listed = example_rows(name, shares, extract.example_squares)
    rows.append(share_row(listed, len(shares), layer=name))
    return rows, listed


def noise_rows(squares: Tensor, squared: float, *, layer: str = "", reason: str = "") -> list[StabilityRow]:
    """Tr Sigma and |G|^2, without bias, from the squared norms of N examples' parts h_n of the gradient and its own.

    With g_n = N h_n: `tr Sigma = (sum |g_n|^2 - N |g|^2) / (N - 1)`, `|G|^2 = |g|^2 - tr Sigma / N`; the second may be
    negative. The first is compared with N |G|^2, where noise and signal of a batch of N are equal; with nothing where
    the estimate of |G|^2 is not positive. Appendix A.1 of arXiv:1812.06162.
    """
    N = squares.numel()
    if N < 2:
        why = "one example has no spread"
        return [missing(name, why, layer=layer) for name in ("gradient_noise", "gradient_signal")]
    noise = float(N * N * squares.sum() - N * squared) / (N - 1)
    signal = squared - noise / N
    if signal <= 0:
        reason = "; ".join(filter(None, ("the estimate of |G|^2 is not positive: noise hides the signal", reason)))
    return [
        sign_row(
            "gradient_noise", noise, layer=layer, threshold=N * signal if signal > 0 else float("nan"), reason=reason
        ),
        sign_row("gradient_signal", signal, layer=layer, reason=reason),
    ]


def _factor_rows(extract: Extract, draws: Draws | None, drawn_B: FactorOfDraws | None) -> list[StabilityRow]:
    """What the diagonals and the extreme eigenvalues of expand's A and B say."""
    if "expand" not in extract.factors:
        return []
    name, bias = extract.spec.name, extract.spec.bias is not None
    A, B = (factor.double() for factor in extract.factors["expand"])
    dead = float((B.diagonal(dim1=-2, dim2=-1) == 0).double().mean())
    B_draws = None if draws is None else extract.probe_B.get("expand")
    if draws is None or B_draws is None:
        rows = [sign_row("dead_outputs", dead, layer=name), *_condition(name, "B", B)]
    else:
        rows = [dead_outputs(name, dead, draws), *condition_of_B(name, B, B_draws, draws, drawn_B)]
    if A.ndim == 1:
        return rows + [missing(quantity, OF_TOKENS, layer=name) for quantity in ("mean_share", "unresolved_A")]
    inputs = A.diagonal(dim1=-2, dim2=-1)
    if bias:
        inputs = inputs[..., :-1]
    rows.append(sign_row("dead_inputs", float((inputs == 0).double().mean()), layer=name))
    total = float(inputs.sum())
    if extract.mean_input is not None and total > 0:
        share = float(extract.mean_input.square().sum()) / total
        rows.append(sign_row("mean_share", share, layer=name))
    else:
        rows.append(missing("mean_share", "all inputs are zero on this batch", layer=name))
    return rows + _condition(name, "A", A)


def _condition(name: str, which: str, factor: Tensor) -> list[StabilityRow]:
    """lambda_max / lambda_min of one factor (of the worst group), and how much of it float32 does not resolve.

    Eigenvalues up to lambda_max n eps are rounding: where there are any, their share is told and the ratio is not.
    """
    condition, unresolved = f"condition_{which}", f"unresolved_{which}"
    size = factor.shape[-1]
    if not bool((factor != 0).any()):
        return [missing(quantity, f"{which} is zero on this batch", layer=name) for quantity in (condition, unresolved)]
    values = torch.linalg.eigvalsh(factor).reshape(-1, size)
    least, most = values[:, 0], values[:, -1]
    floor = most * size * torch.finfo(torch.float32).eps
    rank = int((values > floor[:, None]).sum(1).min())
    words = RESOLVED.format(rank=rank, size=size)
    share = sign_row(unresolved, 1 - rank / size, layer=name, reason=words)
    if rank < size:
        return [missing(condition, f"singular to float32: {words}", layer=name), share]
    return [sign_row(condition, float((most / least).max()), layer=name), share]


def _limit(extract: Extract, errors: Mapping[str, ErrorRow]) -> StabilityRow:
    """How much of the better K-FAC's error the nearest single Kronecker product has, too."""
    name = extract.spec.name
    values = [errors[key].rel_frobenius for key in ("kfac_expand", "kfac_reduce") if key in errors]
    nearest = errors.get("kron_best")
    known = [value for value in values if value == value]
    if nearest is None or nearest.rel_frobenius != nearest.rel_frobenius or not known:
        why = nearest.reason if nearest is not None and nearest.reason else "the errors were not assessed"
        return missing("kronecker_limit", why, layer=name)
    dtype = next((A.dtype for A, _ in extract.factors.values()), torch.float32)
    least = LEAST_ERROR.get(dtype, 1e-2)
    if min(known) < least:
        why = f"K-FAC is within {least:g} of the block: a ratio of such errors is one of roundings"
        return missing("kronecker_limit", why, layer=name)
    return sign_row("kronecker_limit", nearest.rel_frobenius / min(known), layer=name)


def _positions(extract: Extract, rows: Rows | str, draws: Draws | None) -> StabilityRow:
    """The largest share that one position (a convolution's output pixel) has in the trace of expand's B."""
    name, kind = extract.spec.name, extract.spec.kind
    if kind != "linear" and not kind.startswith("conv"):
        return missing("position_share", f"told of linear layers and convolutions, not of {kind}", layer=name)
    if isinstance(rows, str):
        return missing("position_share", rows, layer=name)
    if extract.padded > 0:
        return missing("position_share", f"{UNEQUAL} (padding)", layer=name)
    if len(extract.spec.sites) > 1:
        return missing("position_share", "its positions are calls of one weight, one after the other", layer=name)
    # a column at a time: all squares together would be as large as the gradients
    squares = torch.stack([g.square().sum(-1, dtype=torch.float64) for g in rows.gradients])
    each = squares.view(len(squares), extract.examples, -1).sum(1)
    energy = each.sum(0)
    if energy.numel() != extract.positions:
        return missing("position_share", f"{UNEQUAL} (examples of unequal size)", layer=name)
    if energy.numel() < LEAST_POSITIONS:
        return missing("position_share", f"fewer than {LEAST_POSITIONS} positions", layer=name)
    if not float(energy.sum()) > 0:
        return missing("position_share", "no curvature reaches the layer", layer=name)
    if draws is not None:
        return position_share(name, each, draws)
    shares = energy / energy.sum()
    place = int(shares.argmax())
    words = f"position {place} of {shares.numel()}"
    if kind.startswith("conv") and not kind.endswith("1d"):
        words += ", counted along the last axis first"
    return sign_row("position_share", float(shares[place]), layer=name, reason=words)


def top_shares(extract: Extract, blocks: Sequence[Block], rows: Rows | str, seed: int) -> Tensor | str:
    """Each example's share [N] of u^T G u, u the top eigenvector of the layer's block; or why it is not known.

    With q the top eigenvector of `V^T V` the columns of example n hold `sum_k q[n,k]^2`; of G itself u is taken, and
    `v . u` from the rows.
    """
    if not blocks:
        return "the layer's columns were not kept"
    if len(blocks) > 1:
        return "the layer has groups, each with a top direction of its own"
    (block,) = blocks
    if not block.trace > 0:
        return "the exact block is zero on this batch"
    gram = block.gram
    found = extremes(lambda x: gram @ x, gram.shape[0], device=gram.device, seed=seed, tolerance=1e-4).top[0]
    if block.columns.form != "formed":
        energy = found.vector.square()
    elif isinstance(rows, str):
        return rows
    else:
        turned = rows.inputs @ found.vector.view(block.d_out, block.d_in).to(rows.inputs).T  # [N', R, d_out]
        energy = torch.stack([(g * turned).sum((1, 2), dtype=torch.float64) for g in rows.gradients]).square()
    each = energy.view(block.columns.count, extract.examples, -1).sum((0, 2))
    return each / each.sum()


def example_rows(layer: str, shares: Tensor, squares: Tensor | None) -> list[ExampleRow]:
    """The examples with the largest shares, the first of them first."""
    order = torch.argsort(shares, descending=True)[:LISTED].tolist()
    of_gradient = None if squares is None or not float(squares.sum()) > 0 else squares / squares.sum()
    return [
        ExampleRow(layer, n, float(shares[n]), float("nan") if of_gradient is None else float(of_gradient[n]))
        for n in order
    ]


def share_row(rows: Sequence[ExampleRow], examples: int, *, layer: str = "") -> StabilityRow:
    """The largest share of the curvature, of the examples listed (at least one) out of so many."""
    if examples < LEAST_EXAMPLES:
        reason = f"{'one example has' if examples == 1 else f'of {examples} examples any has'} a large share"
        return missing("example_share", f"{reason}: told from {LEAST_EXAMPLES} examples on", layer=layer)
    return sign_row("example_share", rows[0].curvature_share, layer=layer, reason=indices(rows))


def indices(rows: Sequence[ExampleRow]) -> str:
    """The examples in words, as many as it takes for half of the curvature."""
    parts, total = [], 0.0
    for row in rows:
        parts.append(f"{row.example} ({row.curvature_share:.0%})")
        total += row.curvature_share
        if total >= 0.5:
            break
    return f"example{'s' if len(parts) > 1 else ''} {', '.join(parts)}"
