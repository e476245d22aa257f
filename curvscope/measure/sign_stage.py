"""All signs of the network and its layers beside sharpness, as rows of the stability table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvscope.extract.pieces import Piece
from curvscope.graph.activations import Observer
from curvscope.graph.entry import shape_of
from curvscope.graph.functional import Graph
from curvscope.graph.sites import LayerSpec
from curvscope.load.optimizer_settings import OptimizerSettings
from curvscope.measure.data_signs import InputSizes, OutputSigns
from curvscope.measure.layer_signs import noise_rows
from curvscope.measure.network import Network
from curvscope.measure.preconditioner import Preconditioner
from curvscope.measure.scale_signs import activation_signs, input_signs, norm_signs, weight_signs
from curvscope.measure.update_signs import update_signs
from curvscope.records import Layer, StabilityRow


def signs(
    network: Network,
    layers: Mapping[str, Layer],
    gradients: Sequence[Mapping[str, Tensor]],
    settings: OptimizerSettings | None,
    P: Preconditioner | None,
) -> list[StabilityRow]:
    """The network's signs and those of its layers, by one reading of the data.

    Args:
        network: the loss on all data.
        layers: what was measured of each layer.
        gradients: of all data and of its halves, for spreads.
        settings: the optimizer's, where one is known.
        P: its preconditioner, where there is one.
    """
    graph = network.graph
    factors = {name: layer.factors for name, layer in layers.items()}
    specs = {name: spec for name, spec in graph.layers.items() if spec.selected}
    shape = shape_of(graph)
    rows = _noise(graph, layers)
    last = shape.last[0] if shape is not None and len(shape.last) == 1 and shape.last[0] in specs else ""
    sizes, outputs, observer = _seen(network, last)
    rows += outputs.rows()
    rows += input_signs(sizes.row(), shape, factors, specs)
    rows += weight_signs(graph.parameters, specs, shape, factors)
    activations = observer.seen()
    rows += activation_signs(activations)
    rows += norm_signs(shape, activations)
    if settings is not None:
        rows += update_signs(settings, network.parameters, gradients, {n: members(s) for n, s in specs.items()}, P)
    return rows


def _seen(network: Network, last: str) -> tuple[InputSizes, OutputSigns, Observer]:
    """What inputs, outputs and activations show; `last` is the layer that makes the outputs."""
    graph, data = network.graph, network.examples

    def start() -> tuple[InputSizes, OutputSigns, Observer]:
        return InputSizes(data.pieces.axes), OutputSigns(data.loss, last), Observer(graph)

    def take(seen: tuple[InputSizes, OutputSigns, Observer], piece: Piece) -> tuple[InputSizes, OutputSigns, Observer]:
        sizes, outputs, observer = seen
        sizes.add(piece.tensors)
        with torch.no_grad():
            outputs.add(network.outputs(piece), piece.targets)
        observer.add(piece.tensors)
        return seen

    return network.gathered(start, take, 2)


def members(spec: LayerSpec) -> Sequence[str]:
    """The parameters of a layer."""
    if spec.exact_only:
        return list(spec.members)
    return [spec.weight, *([spec.bias] if spec.bias is not None else [])]


def _noise(graph: Graph, layers: Mapping[str, Layer]) -> list[StabilityRow]:
    """The noise of the whole gradient, over all layers that were analyzed."""
    squares = [layer.example_gradients for layer in layers.values() if layer.example_gradients is not None]
    if not squares:
        return []
    total = torch.as_tensor(sum(squares))
    squared = sum(float(layer.attributes.get("gradient_norm", 0.0)) ** 2 for layer in layers.values())
    left_out = [use.parameter for use in graph.uses if use.treatment == "uncovered"]
    reason = f"without {len(left_out)} parameters that belong to no layer here" if left_out else ""
    return noise_rows(total, squared, reason=reason)
