"""All signs of the network and its layers beside sharpness, as rows of the stability table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvscope.graph.activations import observe
from curvscope.graph.entry import shape_of
from curvscope.graph.functional import Graph
from curvscope.graph.sites import LayerSpec
from curvscope.load.optimizer_settings import OptimizerSettings
from curvscope.load.problem import Loss
from curvscope.measure.layer_signs import noise_rows
from curvscope.measure.network import Network
from curvscope.measure.preconditioner import Preconditioner
from curvscope.measure.scale_signs import activation_signs, input_signs, norm_signs, output_signs, weight_signs
from curvscope.measure.update_signs import update_signs
from curvscope.records import Layer, StabilityRow


@dataclass(frozen=True)
class Seen:
    """What the stages before have found out: the pieces that signs are read from."""

    graph: Graph
    tensors: Sequence[Tensor]
    axes: Sequence[int | None]
    loss: Loss
    outputs: Tensor | None
    targets: Any
    layers: Mapping[str, Layer]


def signs(
    seen: Seen,
    network: Network | None,
    gradients: Sequence[Mapping[str, Tensor]],
    settings: OptimizerSettings | None,
    P: Preconditioner | None,
) -> list[StabilityRow]:
    """The network's signs and those of its layers; `gradients` of the batch and of its halves, for spreads."""
    factors = {name: layer.factors for name, layer in seen.layers.items()}
    specs = {name: spec for name, spec in seen.graph.layers.items() if spec.selected}
    shape = shape_of(seen.graph)
    rows = _noise(seen)
    last = shape.last[0] if shape is not None and len(shape.last) == 1 and shape.last[0] in specs else ""
    if seen.outputs is not None:
        rows += output_signs(seen.loss, seen.outputs, seen.targets, last)
    rows += input_signs(seen.tensors, seen.axes, shape, factors, specs)
    rows += weight_signs(seen.graph.parameters, specs, shape, factors)
    activations = observe(seen.graph, seen.tensors)
    rows += activation_signs(activations)
    rows += norm_signs(shape, activations)
    if settings is not None and network is not None:
        rows += update_signs(settings, network.parameters, gradients, {n: members(s) for n, s in specs.items()}, P)
    return rows


def members(spec: LayerSpec) -> Sequence[str]:
    """The parameters of a layer."""
    if spec.exact_only:
        return list(spec.members)
    return [spec.weight, *([spec.bias] if spec.bias is not None else [])]


def _noise(seen: Seen) -> list[StabilityRow]:
    """The noise of the whole gradient, over all layers that were analyzed."""
    squares = [layer.example_gradients for layer in seen.layers.values() if layer.example_gradients is not None]
    if not squares:
        return []
    total = torch.as_tensor(sum(squares))
    squared = sum(float(layer.attributes.get("gradient_norm", 0.0)) ** 2 for layer in seen.layers.values())
    left_out = [use.parameter for use in seen.graph.uses if use.treatment == "uncovered"]
    reason = f"without {len(left_out)} parameters that belong to no layer here" if left_out else ""
    return noise_rows(total, squared, reason=reason)
