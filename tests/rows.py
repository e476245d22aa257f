"""The oracle's rows: what goes into a layer and how the outputs depend on what comes out, of an eager model.

A torch-function mode watches the model run and keeps every operation that takes the layer's weight; a case
says how rows belong to examples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
ToRows = Callable[[Tensor], Tensor]

# Where the input and the weight stand among the arguments of each operation that can apply a weight.
INPUT_AND_WEIGHT = {
    "linear": (0, 1),
    "matmul": (0, 1),
    "__matmul__": (0, 1),
    "mm": (0, 1),
    "addmm": (1, 2),
    "conv1d": (0, 1),
    "conv2d": (0, 1),
    "conv3d": (0, 1),
}


def call(model: nn.Module, inputs: Inputs, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
    """The model's output tensor, with some of its parameters replaced: the first of a tuple, or `logits`."""
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    result = torch.func.functional_call(model, dict(parameters or {}), args, kwargs)
    if isinstance(result, Mapping):
        return result["logits"]
    return result[0] if isinstance(result, tuple) else result


def examples_first(rows: Tensor) -> Tensor:
    """[N, ..., d] -> [N, R, d]."""
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])


def patches(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """What a convolution sees at every output position: [N, C, *size] -> [N, positions, C * prod(kernel)]."""
    x = functional.pad(x, [side for pair in reversed(padding) for side in pair])
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    starts = [range(0, n - r + 1, s) for n, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    rows = []
    for corner in product(*starts):
        window = x
        for axis, (i, r, d) in enumerate(zip(corner, reach, dilation, strict=True), start=2):
            window = window.index_select(axis, torch.arange(i, i + r, d))
        rows.append(window.flatten(1))
    return torch.stack(rows, dim=1)


@dataclass(frozen=True)
class Use:
    """One application of a weight: its input rows and its output, with the function that makes rows of it."""

    input_rows: Tensor
    output: Tensor
    output_rows: ToRows


def _convolution_use(x: Tensor, weight: Tensor, output: Tensor, settings: dict[str, Any], to_rows: ToRows) -> Use:
    if settings["groups"] != 1:
        raise NotImplementedError("grouped convolutions")
    dims, kernel = weight.dim() - 2, tuple(weight.shape[2:])

    def per_dimension(value: int | tuple[int, ...]) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * dims if len(values) == 1 else values

    dilation = per_dimension(settings["dilation"])
    padding: tuple[tuple[int, int], ...]
    if settings["padding"] == "valid":
        padding = ((0, 0),) * dims
    elif settings["padding"] == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        padding = tuple((total // 2, total - total // 2) for total in totals)
    else:
        padding = tuple((p, p) for p in per_dimension(settings["padding"]))
    rows = patches(x.detach(), kernel, per_dimension(settings["stride"]), padding, dilation)
    return Use(to_rows(rows), output, lambda s: to_rows(s.flatten(2).mT))


class _Recorder(TorchFunctionMode):
    """Keeps every use of one parameter while a model runs."""

    def __init__(self, parameter: nn.Parameter, to_rows: ToRows) -> None:
        super().__init__()
        self.parameter = parameter
        self.to_rows = to_rows
        self.uses: list[Use] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            # Inside a Python-level function the mode is off; switch it on again for the projections.
            with self, mock.patch.object(functional, "has_torch_function", return_value=False):
                return func(*args, **kwargs)
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name not in INPUT_AND_WEIGHT:
            return output
        x, weight = (args[i] for i in INPUT_AND_WEIGHT[name])
        if weight is not self.parameter and weight._base is not self.parameter:
            return output
        if name.startswith("conv"):
            defaults = (None, None, None, 1, 0, 1, 1)
            order = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            settings = dict(zip(order, args + defaults[len(args) :], strict=True)) | kwargs
            self.uses.append(_convolution_use(x, weight, output, settings, self.to_rows))
        else:
            self.uses.append(Use(self.to_rows(x.detach().clone()), output, self.to_rows))
        # What follows may work in place on the layer's output: it gets a copy.
        return output.clone()


@dataclass(frozen=True)
class LayerIO:
    """What goes into a layer and how the outputs depend on what comes out of it.

    a: [N, R, d_in(+1)], a constant 1 last where the layer has a bias; jacobian: d f[n, j] / d s[n, r, o] as
    [N, D, R, d_out]. Several uses of the weight are further positions.
    """

    a: Tensor
    jacobian: Tensor


def layer_io(
    model: nn.Module,
    inputs: Inputs,
    weight_name: str,
    bias_name: str | None = None,
    to_rows: ToRows = examples_first,
) -> LayerIO:
    """Rows and output Jacobians of one layer.

    `to_rows` maps a tensor laid out as the layer's input or output (for convolutions [batch, positions,
    d]) to [N, R, d]. Raises ValueError if by that layout an example depends on the rows of another.
    """
    model = copy.deepcopy(model).requires_grad_(True)
    recorder = _Recorder(dict(model.named_parameters())[weight_name], to_rows)
    with recorder:
        outputs = call(model, inputs)
    if not recorder.uses:
        raise ValueError(f"the model applies {weight_name} by no operation that the oracle knows")
    flat = outputs.reshape(outputs.shape[0], -1)
    N, D = flat.shape
    jacobian = []
    for n, j in product(range(N), range(D)):
        gradients = torch.autograd.grad(
            flat[n, j], [use.output for use in recorder.uses], retain_graph=True, materialize_grads=True
        )
        rows = [use.output_rows(g) for use, g in zip(recorder.uses, gradients, strict=True)]
        jacobian.append(torch.cat(rows, dim=1))
    everything = torch.stack(jacobian).reshape(N, D, *jacobian[0].shape)
    own = torch.stack([everything[n, :, n] for n in range(N)])
    foreign = everything.clone()
    for n in range(N):
        foreign[n, :, n] = 0
    if foreign.abs().max() > 1e-12 * own.abs().max():
        raise ValueError(f"{weight_name}: an example's outputs depend on rows of another example")
    a = torch.cat([use.input_rows for use in recorder.uses], dim=1)
    if bias_name is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], dim=2)
    return LayerIO(a, own)
