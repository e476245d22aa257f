"""A layer's parameters as the matrix [d_out, d_in(+1)] that everything about the layer is stated in, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvscope.graph.sites import LayerSpec


def to_matrix(spec: LayerSpec, parameters: Mapping[str, Tensor]) -> Tensor:
    """The layer's parameters (or gradients, or a step) as one matrix [d_out, d_in(+1)], the bias as last column.

    An exact-only layer is one row of all its members. What `parameters` lacks counts as zero.
    """
    if spec.exact_only:
        like = next(parameters[name] for name in spec.members if name in parameters)
        parts = [
            parameters[name].flatten() if name in parameters else like.new_zeros(size)
            for name, size in spec.members.items()
        ]
        return torch.cat(parts).unsqueeze(0)
    weight = parameters[spec.weight]
    assert spec.form is not None
    matrix = weight.reshape(spec.form.view).permute(spec.form.order).reshape(spec.d_out, -1)
    if spec.bias is None:
        return matrix
    bias = parameters.get(spec.bias)
    column = matrix.new_zeros(spec.d_out, 1) if bias is None else bias.reshape(-1, 1)
    return torch.cat([matrix, column], dim=1)


def to_parameters(spec: LayerSpec, matrix: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The inverse of `to_matrix`: name -> tensor in the parameter's own shape."""
    if spec.exact_only:
        pieces = matrix.flatten().split(list(spec.members.values()))
        return {name: piece.view(shapes[name]) for name, piece in zip(spec.members, pieces, strict=True)}
    shape = shapes[spec.weight]
    assert spec.form is not None
    view, order = spec.form.view, spec.form.order
    weight = matrix[:, : spec.d_in].reshape([view[axis] for axis in order])
    back = sorted(range(len(order)), key=order.__getitem__)
    found = {spec.weight: weight.permute(back).reshape(shape)}
    if spec.bias is not None:
        found[spec.bias] = matrix[:, spec.d_in].reshape(shapes[spec.bias])
    return found
