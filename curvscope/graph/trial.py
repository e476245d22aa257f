"""One plain forward pass before anything is traced: what the model refuses is told in words."""

from __future__ import annotations

import os
import traceback

import torch
from torch import Tensor, nn

from curvscope.errors import BatchError, CurvscopeError, ModelError, out_of_memory
from curvscope.graph.export import FlatInputs, output_tensor

# What torch says of an operation on two dtypes.
MIXED = ("same dtype", "expected scalar type", "to have the dtype", "Input type")


def try_forward(twin: nn.Module, flat: FlatInputs, tensors: tuple[Tensor, ...]) -> None:
    """One plain forward pass of a shadow, and another where the first one drew; the random state is put back.

    Raises:
        BatchError: the model raises on this batch.
        ModelError: no output tensor can be told, or the two passes differ.
    """
    args, kwargs = flat.rebuild(tensors)
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            before = _random_states(devices)
            output = output_tensor(twin(*args, **kwargs))
            if all(torch.equal(*pair) for pair in zip(before, _random_states(devices), strict=True)):
                return
            again = output_tensor(twin(*args, **kwargs))
    except CurvscopeError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise refused(error, flat, twin) from error
    if output.shape != again.shape or not torch.allclose(output, again, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise ModelError(
            "The model is random: two passes over the same batch, in eval mode, differ.",
            where="the model's forward pass",
            remedy="Turn off what it draws outside of training: F.dropout needs training=self.training, and noise a "
            "condition of the same kind.",
        )


def _random_states(devices: list[int]) -> list[Tensor]:
    return [torch.random.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def check_sizes(flat: FlatInputs, dtype: torch.dtype) -> None:
    """Refuse inputs whose squares are beyond the run's precision: the factors are sums of them.

    A mask to be added (0 and one other number) may hold any.

    Raises:
        BatchError: naming the input.
    """
    most = torch.finfo(dtype).max ** 0.5
    for name, tensor in zip(flat.names, flat.tensors, strict=True):
        if not tensor.is_floating_point():
            continue
        size = float(tensor.abs().max())
        if size > most and size < torch.inf and len(tensor.unique()) > 2:
            raise BatchError(
                f"Input {name} holds numbers of up to {size:.2g}, whose squares overflow in "
                f"{str(dtype).removeprefix('torch.')}.",
                where=f"input {name}",
                remedy="Give the inputs as the training scales them, or analyze with --dtype float64.",
            )


def refused(error: Exception, flat: FlatInputs, model: nn.Module | None = None) -> BatchError:
    """The error for a batch on which the model raises, with the shapes and dtypes of its inputs, and where it does."""
    shapes = ", ".join(
        f"{name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in zip(flat.names, flat.tensors, strict=True)
    )
    first = (str(error).strip().splitlines() or [""])[0]
    mixed = any(words in first for words in MIXED)
    cast = "Its forward pass meets two dtypes: let it cast to a weight's own, x.to(self.weight.dtype), or "
    narrow = model is None or all(p.dtype != torch.float64 for p in model.parameters())
    if narrow and "double" in first.lower():
        cast += 'run all of it in float64, --dtype float64 (in Python dtype="float64"), or '
    inputs = "ive the inputs with the shapes, dtypes and keywords that the model's forward pass takes."
    return BatchError(
        f"The model refuses the batch: {type(error).__name__}: {first}",
        where=f"inputs {shapes}{'' if model is None else _place(error, model)}",
        remedy=f"{cast}g{inputs}" if mixed else f"G{inputs}",
    )


def _place(error: Exception, model: nn.Module) -> str:
    """The innermost module that was running, and the innermost line that is not torch's own."""
    names = {id(module): name for name, module in model.named_modules()}
    module, line = "", ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        own = frame.f_locals.get("self")
        if names.get(id(own)):
            module = f"; module {names[id(own)]} ({type(own).__name__})"
        name = frame.f_globals.get("__name__", "")
        if name.partition(".")[0] not in ("torch", "curvscope"):
            line = f"; {os.path.basename(frame.f_code.co_filename)}, line {number}"
    return module + line
