"""How many bytes the passes take for each example, measured on a few, and giving freed memory back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvscope.graph.functional import Graph
from curvscope.graph.taps import Tap

# Gradients that are alive at once in a backward pass, in units of the largest activation.
GRADIENTS = 3


def bytes_an_example(graph: Graph, tensors: Sequence[Tensor], examples: int) -> int:
    """What a forward pass stores for one example until its backward passes are over, with the rows of the layers.

    Measured on the given examples: what autograd saves, what the layers keep of their inputs, the patches that
    convolutions unfold, and the gradients that are under way.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in graph.parameters.values()}
    stored: dict[int, int] = {}
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            stored[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # else its place could be taken by another
        return tensor

    rows: list[int] = []

    def watch(module: Any, args: tuple[Tensor, ...], result: Tensor) -> None:
        keep(args[0].detach())
        keep(result.detach())
        if not isinstance(module, (Tap, nn.Linear)):
            inputs = module.weight[0].numel() * module.groups
            rows.append(result.numel() // result.shape[1] * inputs * result.element_size())

    handles = [site.module.register_forward_hook(watch) for site in graph.sites()]
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = graph.run(*tensors)
    finally:
        for handle in handles:
            handle.remove()
    largest = max([*stored.values(), output.untyped_storage().nbytes()])
    return (sum(stored.values()) + GRADIENTS * largest + sum(rows)) // examples


def release() -> None:
    """Give memory that was freed back to the system: glibc keeps blocks of up to 32 MiB otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
