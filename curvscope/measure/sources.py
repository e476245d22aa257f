"""Why each K-FAC errs at a layer, as rows of tables/sources: `measure.split` where the rows are there and it pays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from curvscope.curvature.block import Block
from curvscope.curvature.kronecker import Kronecker
from curvscope.extract.collector import Extract
from curvscope.extract.cost import SPLIT_FREE
from curvscope.measure.approximate import Built
from curvscope.measure.rows_kept import Rows, mean_input, rows_of, with_rows
from curvscope.measure.split import split_error, split_flops
from curvscope.measure.terms import FLAVOURS
from curvscope.records import SourceRow

# Below this relative error float32 rows leave the shares no digits: squared errors are good to about 1e-6.
LEAST_ERROR = {torch.float32: 1e-2, torch.float64: 1e-6}


def source_rows(extract: Extract, block: Block, built: Mapping[str, Built], *, every: bool) -> dict[str, SourceRow]:
    """`SourceRow` of both K-FACs of a layer with exact columns; what can't be split says why."""
    layer = extract.spec.name
    rows = rows_of(extract)
    if isinstance(rows, str):
        return not_assessed(layer, rows)
    stated = with_rows(block, rows)
    if rows.inputs.shape[0] > 2 * block.parameters:
        stated = block  # with so many examples the products with G itself are fewer
    found: dict[str, SourceRow] = {}
    for flavour in FLAVOURS:
        name = f"kfac_{flavour}"
        if flavour == "reduce" and extract.positions == 1:
            found[name] = dataclasses.replace(found["kfac_expand"], approximation=name)
            continue
        found[name] = _split(extract, stated, rows, built[name], name, every=every)
    return found


def not_assessed(layer: str, reason: str) -> dict[str, SourceRow]:
    """Both rows with the reason."""
    return {
        name: SourceRow(layer, name, status="not_assessed", reason=reason)
        for name in (f"kfac_{flavour}" for flavour in FLAVOURS)
    }


def _split(extract: Extract, block: Block, rows: Rows, built: Built, name: str, *, every: bool) -> SourceRow:
    layer, kronecker = extract.spec.name, built.approximation
    assert isinstance(kronecker, Kronecker)
    if block.norm == 0.0:
        return SourceRow(layer, name, status="not_assessed", reason="the exact block is zero on this batch")
    relative = (max(block.norm**2 - 2 * built.inner + kronecker.norm**2, 0.0) ** 0.5) / block.norm
    least = LEAST_ERROR.get(rows.inputs.dtype, 1e-2)
    if relative < least:
        reason = f"K-FAC is within {least:g} of the block, where rounding leaves the shares of its error no digits"
        return SourceRow(layer, name, status="not_assessed", reason=reason)
    a, g = (rows.inputs, rows.gradients) if name == "kfac_expand" else rows.reduced()
    cost = split_flops(
        block.total_columns, a.shape[0] * a.shape[1] * g.shape[0] // block.columns.count, block.parameters
    )
    if block.columns.form == "formed":
        cost = 4.0 * a.shape[0] * a.shape[1] * g.shape[0] * block.parameters**2
    if cost > SPLIT_FREE and not every:
        reason = f"it would take about {cost / 1e9:.0f} GFLOP; --measure split computes it all the same"
        return SourceRow(layer, name, relative, status="skipped", reason=reason)
    if name == "kfac_expand":
        mean = mean_input(extract, a, bias=extract.spec.bias is not None)
    else:
        mean = a.double().mean((0, 1))
    split = split_error(block, kronecker, a, g, mean, inner=built.inner)
    return SourceRow(layer, name, split.relative, split.spread, split.mean, split.cross)
