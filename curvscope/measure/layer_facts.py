"""What a layer's record says of its factors: how they are stored, in which unit, with which raw extremes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from curvscope.curvature.eigen import eigvalsh
from curvscope.extract.collector import Extract
from curvscope.measure.factor_estimate import FactorOfDraws, factor_errors
from curvscope.measure.terms import FLAVOURS
from curvscope.records import ErrorRow, KroneckerFactors, LayerRow


def stored_factors(extract: Extract) -> list[tuple[str, str, str, tuple[Tensor, Tensor]]]:
    """All factors as (key of Layer.factors, flavour, role, (A, B)), flavour by flavour."""
    roles = extract.roles or {"": extract}
    return [
        (f"{flavour}/{name}" if name else flavour, flavour, name, role.factors[flavour])
        for flavour in FLAVOURS
        for name, role in roles.items()
        if flavour in role.factors
    ]


def tokens_of(extract: Extract) -> Any:
    """The tokens that A of reduce runs over, of an embedding."""
    found = [each.tokens for each in (extract, *extract.roles.values()) if each.tokens is not None]
    return found[0].cpu().numpy() if found else None


def in_loss_unit(tensor: Tensor, scale: float) -> Any:
    """The tensor in the loss's own unit; in float64 where its own dtype could not hold it."""
    if scale == 1.0:
        return tensor.cpu().numpy()
    exact = tensor.double() * scale
    size = float(exact.abs().max()) if exact.numel() else 0.0
    fits = torch.finfo(tensor.dtype).tiny * 1e8 <= size <= torch.finfo(tensor.dtype).max / 1e8
    return (exact.to(tensor.dtype) if fits else exact).cpu().numpy()


def factor_facts(
    extract: Extract, scale: float, drawn: Mapping[tuple[str, str], FactorOfDraws | None]
) -> dict[str, Any]:
    """Trace and raw extreme eigenvalues of every factor, for the file's attributes.

    A B made of draws has their number beside it, and standard errors where `drawn` has it, by role and flavour.
    """
    facts: dict[str, Any] = {}
    for key, flavour, role, pair in stored_factors(extract):
        each = (extract.roles or {"": extract})[role].probe_B.get(flavour)
        if each is not None:
            facts[f"{key}/B/draws"] = len(each)
            facts |= factor_errors(drawn.get((role, flavour)), f"{key}/B", scale)
        for name, factor in zip("AB", pair, strict=True):
            exact = factor.double() * (scale if name == "B" else 1.0)
            # a vector is a diagonal
            values = exact if exact.ndim == 1 else eigvalsh(exact)
            facts[f"{key}/{name}/trace"] = float(
                exact.sum() if exact.ndim == 1 else exact.diagonal(dim1=-2, dim2=-1).sum()
            )
            facts[f"{key}/{name}/lambda_max"] = float(values.max())
            facts[f"{key}/{name}/lambda_min"] = float(values.min())
    if extract.gradient is not None:
        facts["gradient_norm"] = float(torch.linalg.norm(extract.gradient.double()))
    return facts


def better_flavour(single: bool, errors: dict[str, ErrorRow]) -> str:
    """expand, reduce, or same; empty where the errors are unknown."""
    expand, reduce = (errors[f"kfac_{flavour}"].rel_frobenius for flavour in FLAVOURS)
    if np.isnan(expand) or np.isnan(reduce):
        return ""
    if single:
        return "same"
    return "expand" if expand <= reduce else "reduce"


def factor_records(extract: Extract) -> dict[str, KroneckerFactors]:
    """The factors as the run stores them, in the loss's own unit."""
    return {
        key: KroneckerFactors(flavour, A.cpu().numpy(), in_loss_unit(B, extract.unit**-2), role)
        for key, flavour, role, (A, B) in stored_factors(extract)
    }


def layer_row(extract: Extract, columns: int, better: str, reason: str) -> LayerRow:
    """The layer's line in tables/layers; without columns it is not assessed, for the reason."""
    spec = extract.spec
    return LayerRow(
        name=spec.name,
        kind=spec.kind,
        d_in=spec.d_in,
        d_out=spec.d_out,
        bias=spec.bias is not None,
        groups=spec.groups,
        parameters=spec.parameters,
        examples=extract.examples,
        positions=extract.positions,
        columns=columns,
        better_flavour=better,
        padded=extract.padded,
        status="ok" if columns else "not_assessed",
        reason=reason,
    )
