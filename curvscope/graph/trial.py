"""One plain forward pass before anything is traced: what the model refuses is told in words."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from curvscope.errors import BatchError, CurvscopeError, out_of_memory
from curvscope.graph.export import FlatInputs, output_tensor


def try_forward(twin: nn.Module, flat: FlatInputs, tensors: tuple[Tensor, ...]) -> None:
    """One plain forward pass of a shadow; the random state is put back.

    Raises:
        BatchError: the model raises on this batch.
        ModelError: no output tensor can be told.
    """
    args, kwargs = flat.rebuild(tensors)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = twin(*args, **kwargs)
    except CurvscopeError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise refused(error, flat) from error
    output_tensor(output)


def refused(error: Exception, flat: FlatInputs) -> BatchError:
    """The error for a batch on which the model raises, with the shapes and dtypes of its inputs."""
    shapes = ", ".join(
        f"{name}: {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in zip(flat.names, flat.tensors, strict=True)
    )
    first = (str(error).strip().splitlines() or [""])[0]
    return BatchError(
        f"The model refuses the batch: {type(error).__name__}: {first}",
        where=f"inputs {shapes}",
        remedy="Give the inputs with the shapes, dtypes and keywords that the model's forward pass takes.",
    )
