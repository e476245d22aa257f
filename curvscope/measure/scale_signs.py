"""Signs of scale: of what the first layers read, of weights, of what the layers pass on."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from curvscope.graph.activations import Activations
from curvscope.graph.entry import Shape
from curvscope.graph.matrix import to_matrix
from curvscope.graph.sites import LayerSpec
from curvscope.measure.network import Vector
from curvscope.measure.signs import missing, sign_row
from curvscope.records import KroneckerFactors, StabilityRow

NOT_SEEN = "the model runs as eager modules, whose order is not seen"
# Networks of fewer convolutions do without a norm.
FEW_CONVOLUTIONS = 3


def input_signs(
    odd: StabilityRow,
    shape: Shape | None,
    factors: Mapping[str, Mapping[str, KroneckerFactors]],
    specs: Mapping[str, LayerSpec],
) -> list[StabilityRow]:
    """`odd_example`, see `InputSizes`, and `input_scale` of the layers that read the model's inputs: the RMS of what
    they read.
    """
    if shape is None:
        return [odd, missing("input_scale", NOT_SEEN)]
    rows = [odd]
    for layer in shape.first:
        scale = _input_rms(layer, factors, specs)
        if not math.isnan(scale):
            rows.append(sign_row("input_scale", scale, layer=layer))
    return rows


def _input_rms(
    layer: str, factors: Mapping[str, Mapping[str, KroneckerFactors]], specs: Mapping[str, LayerSpec]
) -> float:
    """sqrt(tr A / d_in) without the bias, over all groups; NaN where there are no factors."""
    if "expand" not in factors.get(layer, {}):
        return math.nan
    A = torch.as_tensor(factors[layer]["expand"].A).double()
    if A.ndim == 1:
        return math.nan
    squares = A.diagonal(dim1=-2, dim2=-1)
    if specs[layer].bias is not None:
        squares = squares[..., :-1]
    return float(squares.mean()) ** 0.5


def weight_signs(
    parameters: Vector,
    specs: Mapping[str, LayerSpec],
    shape: Shape | None,
    factors: Mapping[str, Mapping[str, KroneckerFactors]],
) -> list[StabilityRow]:
    """`weight_scale`: the RMS norm of a weight's rows, sqrt(||W||^2 / d_out), which multiplies the RMS of white inputs;
    of a table that is only looked up in, the RMS of its entries, which is that of what it puts out.
    `recurrent_radius`: the largest |eigenvalue| of a square weight that is called more than once. `signal_drift`: how
    far the RMS of the layers' inputs has grown or shrunk from the first layer that reads inputs to the last.
    """
    rows = []
    for name, spec in specs.items():
        if spec.exact_only or spec.weight not in parameters:
            continue
        matrix = to_matrix(spec, parameters).double()[:, : spec.d_in]
        squares = float(matrix.square().sum())
        roles = [spec.role(role) for role in spec.roles] or [spec]
        scale = max((squares / (matrix.numel() if one.kind == "embedding" else one.d_out)) ** 0.5 for one in roles)
        rows.append(sign_row("weight_scale", scale, layer=name))
        if shape is not None and name in shape.repeated and spec.d_in == spec.d_out and spec.groups == 1:
            radius = float(torch.linalg.eigvals(matrix).abs().max())
            rows.append(sign_row("recurrent_radius", radius, layer=name))
    if shape is None:
        return [*rows, missing("signal_drift", NOT_SEEN)]
    scales = {name: _input_rms(name, factors, specs) for name in specs if not specs[name].exact_only}
    starts = [scales[name] for name in shape.first if scales.get(name, 0.0) > 0]
    ends = [scales[name] for name in shape.last if name in scales and name not in shape.first]
    if not starts or not ends or not max(ends) >= 0:
        return [*rows, missing("signal_drift", "no layer reads the inputs, or the last layer has no factors")]
    ratio = max(ends) / max(starts)
    drift = math.inf if ratio == 0 else max(ratio, 1 / ratio)
    words = f"{ratio:.2g} times from the first layer to the last, {shape.norms} normalisations"
    return [*rows, sign_row("signal_drift", drift, reason=words)]


def norm_signs(shape: Shape | None, seen: Activations | None) -> list[StabilityRow]:
    """`normalisations`: how many there are, of a network that should have some: with attention, or convolutions."""
    if shape is None:
        return [missing("normalisations", NOT_SEEN)]
    attentions = 0 if seen is None else len(seen.attention)
    if not attentions and shape.convolutions < FEW_CONVOLUTIONS:
        return []
    words = f"{attentions} attentions" if attentions else f"{shape.convolutions} convolutions"
    return [sign_row("normalisations", float(shape.norms), reason=words)]


def activation_signs(seen: Activations | None) -> list[StabilityRow]:
    """Rows of what one pass shows of attention and of units; the worst where a layer has several."""
    if seen is None:
        return [missing(name, NOT_SEEN) for name in ("attention_logit", "saturated_units", "dead_units")]
    found: dict[tuple[str, str], tuple[float, str]] = {}
    for attention in seen.attention:
        _worst(found, "attention_logit", attention.layer, attention.logit)
        _worst(found, "attention_collapse", attention.layer, 1 - attention.entropy)
    for units in seen.units:
        if units.kind == "relu":
            _worst(found, "dead_units", units.layer, units.dead, units.kind)
        else:
            _worst(found, "saturated_units", units.layer, units.saturated, units.kind)
    return [sign_row(name, value, layer=layer, reason=why) for (name, layer), (value, why) in found.items()]


def _worst(
    found: dict[tuple[str, str], tuple[float, str]], name: str, layer: str, value: float, reason: str = ""
) -> None:
    if (name, layer) not in found or value > found[name, layer][0]:
        found[name, layer] = (value, reason)
