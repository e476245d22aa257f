"""Exact blocks of an architecture against brute force: Jacobians by one backward pass an output, in float64."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import curvscope
from curvscope.load.problem import Inputs
from curvscope.records import Layer
from curvscope.run import Run
from tests.architectures import Architecture, Built

ANALYZED = {"kronecker", "exact_only"}
ROWS = 2048


def as_inputs(inputs: Any) -> Inputs:
    if isinstance(inputs, dict):
        return Inputs(kwargs=inputs)
    return Inputs(args=inputs if isinstance(inputs, tuple) else (inputs,))


def eager(model: nn.Module, inputs: Any) -> Tensor:
    """The output tensor of the model itself in eval mode."""
    given = as_inputs(inputs)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # another order of additions
    try:
        result = model.eval()(*given.args, **given.kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    if isinstance(result, Tensor):
        return result
    return result.logits if hasattr(result, "logits") else result[0]


class Widened(TorchFunctionMode):
    """Casts to float32 inside a model (RMSNorm) become casts to float64, as in the graph of a float64 run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args, kwargs = pytree.tree_map(
            lambda item: torch.float64 if item is torch.float32 else item, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def in_float64(built: Built) -> Built:
    model, inputs, targets = built
    inputs, targets = pytree.tree_map(
        lambda item: item.double() if isinstance(item, Tensor) and item.is_floating_point() else item,
        (inputs, targets),
    )
    return model.double(), inputs, targets


def output_jacobians(model: nn.Module, output: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
    """d output / d parameter as [all outputs, *shape], zero where a parameter is not reached."""
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if name in wanted), strict=True)
    rows = [
        torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True) for value in output.flatten()
    ]
    return {name: torch.stack(of_one) for name, of_one in zip(names, zip(*rows, strict=True), strict=True)}


# Parameters with axes for heads or experts -> their Jacobian's axes as outputs of the model, rows and inputs.
AXES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("query", "key", "value"), (0, 2, 3, 1)),
    "out": (0, 3, 1, 2),
    **dict.fromkeys(("up", "down"), (0, 1, 3, 2)),
}


def layer_jacobian(
    model: nn.Module, layer: Layer, names: list[str], J: dict[str, Tensor], exact_only: bool
) -> Tensor | None:
    """[all outputs, groups, P of a group] in the order of the layer's columns; None where that order is not plain."""
    row = layer.row
    if row.kind.startswith("embedding"):
        jacobian = J[names[0]].transpose(1, 2)
        if row.kind == "embedding":
            tokens = torch.as_tensor(layer.tokens)
            others = [word for word in range(row.d_in) if word not in tokens]
            assert not jacobian[..., others].any()
            jacobian = jacobian[..., tokens]
        return jacobian.flatten(1).unsqueeze(1)
    if exact_only:
        return torch.cat([J[name].flatten(1) for name in names], dim=1).unsqueeze(1)
    if names[0] in AXES:
        jacobian = J[names[0]].permute(AXES[names[0]]).reshape(len(J[names[0]]), -1, row.d_in)
        jacobian = torch.cat([jacobian, *(J[name].flatten(1).unsqueeze(2) for name in names[1:])], dim=2)
        return jacobian.unflatten(1, (row.groups, -1)).flatten(2)
    if not row.kind.startswith(("linear", "conv")) or sum(J[name].ndim > 2 for name in names) != 1:
        return None
    weight, *bias = sorted(names, key=lambda name: -J[name].ndim)
    jacobian = J[weight]
    if type(model.get_submodule(weight.rpartition(".")[0])).__name__ == "Conv1D":
        jacobian = jacobian.transpose(1, 2)
    jacobian = torch.cat([jacobian.flatten(2), *(J[name].unsqueeze(2) for name in bias)], dim=2)
    return jacobian.unflatten(1, (row.groups, -1)).flatten(2)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": functional.cross_entropy,
    "mse": functional.mse_loss,
}


def exact_run(architecture: Architecture, built: Built) -> Run:
    """The exact run in float64, all columns kept."""
    model, inputs, targets = built
    return curvscope.analyze(
        model,
        (inputs, targets),
        loss=architecture.loss,
        example_axes=dict(architecture.example_axes),
        example_index=architecture.example_index,
        fisher="exact",
        dtype="float64",
        dump=("columns",),
    )


def deviations(architecture: Architecture, run: Run, built: Built, most: int | None = None) -> dict[str, float]:
    """Layer -> the largest deviation of V V^T from sum_n J_n^T H_n J_n, relative to the largest entry.

    Where the order of a layer's columns is no plain one, of the spectrum. `most`: so many layers, spread over the
    model; all by default.
    """
    model, inputs, targets = built
    loss = LOSSES.get(str(architecture.loss), architecture.loss)
    if hasattr(config := getattr(model, "config", None), "_experts_implementation"):
        config._experts_implementation = "eager"  # expert by expert
    with Widened():
        output = eager(model, inputs)
    H = torch.autograd.functional.hessian(
        lambda flat: loss(flat.reshape(output.shape), targets), output.detach().flatten()
    )
    owned: dict[str, list[str]] = {}
    exact_only = set()
    for row in run.tables["coverage"]:
        if row.treatment in ANALYZED:
            owned.setdefault(row.layer, []).append(row.parameter)
        if row.treatment == "exact_only":
            exact_only.add(row.layer)
    assert set(owned) == set(run.layers)
    if most is not None and len(owned) > most:
        owned = dict(list(owned.items())[round(i * (len(owned) - 1) / (most - 1))] for i in range(most))
    J = output_jacobians(model, output, {name for names in owned.values() for name in names})
    return {
        layer: _deviation(model, run.layers[layer], names, J, H, layer in exact_only) for layer, names in owned.items()
    }


def _deviation(
    model: nn.Module, layer: Layer, names: list[str], J: dict[str, Tensor], H: Tensor, exact_only: bool
) -> float:
    V = torch.from_numpy(np.asarray(layer.columns())).double()
    M = layer_jacobian(model, layer, names, J, exact_only)
    if M is None:  # another order of the same numbers has the same spectrum
        M = torch.cat([J[key].flatten(1) for key in names], dim=1)
        # of V V^T as of V^T V, and of M^T H M as of L^T M M^T L with H = L L^T: no parameters x parameters
        eigenvalues, Q = torch.linalg.eigh(H)
        LM = (Q * eigenvalues.clamp(min=0.0).sqrt()).T @ M
        got, want = (torch.linalg.svdvals(each.flatten(1)).square() for each in (V, LM))
        rank = max(len(got), len(want))
        got, want = (functional.pad(each, (0, rank - len(each))) for each in (got, want))
        return _relative(got, want)
    V = V.reshape(layer.row.columns, layer.row.groups, -1)
    return max(_outer_deviation(V[:, group], M[:, group], H) for group in range(layer.row.groups))


def _outer_deviation(V: Tensor, M: Tensor, H: Tensor) -> float:
    """The largest difference of V^T V and M^T H M in parts of the largest entry, by rows, as both may be huge."""
    HM, gap, size = H @ M, 0.0, 0.0
    for rows in torch.arange(V.shape[1]).split(ROWS):
        got, want = V[:, rows].T @ V, M[:, rows].T @ HM
        gap, size = max(gap, float((got - want).abs().max())), max(size, float(want.abs().max()))
    return _in_parts(gap, size)


def _relative(got: Tensor, want: Tensor) -> float:
    """The largest difference in parts of the largest entry; 0 where both are 0."""
    return _in_parts(float((got - want).abs().max()), float(want.abs().max()))


def _in_parts(gap: float, size: float) -> float:
    return 0.0 if gap == 0.0 else gap / size if size else float("inf")
