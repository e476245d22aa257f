"""An analysis together with the whole network it took steps of, and each layer's place in the vector of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import curvscope
from curvscope import pipeline
from curvscope.measure.stage import NetworkStage
from curvscope.measure.whole import WholeNetwork


def with_network(model: nn.Module, batch: Any, loss: Any, **settings: Any) -> tuple[curvscope.Run, WholeNetwork]:
    """The run and its whole network as it was when the run ended."""
    stages: list[NetworkStage] = []

    def recording(*arguments: Any, **keywords: Any) -> NetworkStage:
        stages.append(NetworkStage(*arguments, **keywords))
        return stages[0]

    given = {"dtype": "float64", "fisher": "exact", "measure": "steps", **settings}
    with mock.patch.object(pipeline, "NetworkStage", recording):
        run = curvscope.analyze(model, batch, loss=loss, **given)
    assert stages[0].found is not None
    return run, stages[0].found


def places(run: curvscope.Run, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Layer -> the indices of its parameters in the vector of all, as the matrix [d_out, d_in(+1)]."""
    start, index = 0, {}
    for name, shape in shapes.items():
        index[name] = torch.arange(start, start + shape.numel()).view(shape)
        start += shape.numel()
    found: dict[str, list[Tensor]] = {}
    for row in run.tables["coverage"]:
        if row.layer in run.layers:
            found.setdefault(row.layer, []).append(index[row.parameter])
    matrices = {}
    for layer, members in found.items():
        row = run.layers[layer].row
        if not run.layers[layer].factors:
            matrices[layer] = torch.cat([member.flatten() for member in members]).unsqueeze(0)
            continue
        weight = next(member for member in members if member.ndim > 1)
        weight = (weight.transpose(0, 1) if row.kind.startswith("conv_transpose") else weight).flatten(1)
        biases = [member.flatten().unsqueeze(1) for member in members if member.ndim == 1]
        matrices[layer] = torch.cat([weight, *biases], dim=1)
    return matrices
