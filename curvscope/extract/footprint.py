"""How many bytes the passes take for each example, measured on a few, and giving freed memory back."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvscope.graph.functional import Graph
from curvscope.graph.tap import Tap

# Gradients that are alive at once in a backward pass, in units of the largest activation.
GRADIENTS = 3
# Options of glibc's mallopt, the size from which blocks are handed out by mmap, and where its own adjusting ends.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BLOCK = 2**20
GLIBC_LARGEST = 32 * 2**20


def bytes_an_example(graph: Graph, tensors: Sequence[Tensor], examples: int) -> int:
    """What a forward pass stores for one example until its backward passes are over, with the rows of the layers.

    Measured on the given examples: what autograd saves, what the layers keep of their inputs, the patches that
    convolutions unfold, and the gradients that are under way.
    """
    stored = Stored(graph)
    rows: list[int] = []

    def watch(module: Any, args: tuple[Tensor, ...], result: Tensor) -> None:
        stored.keep(args[0].detach())
        stored.keep(result.detach())
        if not isinstance(module, (Tap, nn.Linear, nn.Embedding)):
            inputs = module.weight[0].numel() * module.groups
            rows.append(result.numel() // result.shape[1] * inputs * result.element_size())

    handles = [site.module.register_forward_hook(watch) for site in graph.sites()]
    try:
        with torch.enable_grad(), stored.watched():
            stored.keep_size(graph.run(*tensors))
    finally:
        for handle in handles:
            handle.remove()
    return (stored.total() + sum(rows)) // examples


class Stored:
    """What autograd saves: bytes of every storage that a graph holds, once each, its parameters aside."""

    def __init__(self, graph: Graph) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in graph.parameters.values()}
        self._bytes: dict[int, int] = {}
        self._held: list[Tensor] = []
        self._largest = 0

    def keep(self, tensor: Tensor) -> Tensor:
        """Counts the tensor, and holds it: else its place could be taken by another."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._bytes[storage.data_ptr()] = storage.nbytes()
            self._held.append(tensor)
        return tensor

    def keep_size(self, tensor: Tensor) -> None:
        """Not stored, but as large as a gradient that will be under way."""
        self._largest = max(self._largest, tensor.untyped_storage().nbytes())

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, everything that autograd saves is counted."""
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor):
            yield

    def total(self) -> int:
        """Everything stored, and the gradients that are alive at once in a backward pass."""
        return sum(self._bytes.values()) + GRADIENTS * max([self._largest, *self._bytes.values()])


@contextlib.contextmanager
def returned_when_freed() -> Iterator[None]:
    """Inside, large blocks go back to the system as soon as they are freed, as far as the C library can be told so.

    glibc would keep freed blocks of up to 32 MiB for later ones, which small results then cut into pieces that are too
    small: an analysis that held 300 MiB at once had 890 resident. Afterwards the limits are those that glibc's own
    adjusting ends with in any process that freed a large block.
    """
    library = _library()
    set_option = getattr(library, "mallopt", None) if hasattr(library, "gnu_get_libc_version") else None
    if set_option is None:
        yield
        return
    try:
        for option, value in ((M_MMAP_THRESHOLD, LARGE_BLOCK), (M_TRIM_THRESHOLD, 4 * LARGE_BLOCK)):
            set_option(option, value)
        yield
    finally:
        for option, value in ((M_MMAP_THRESHOLD, GLIBC_LARGEST), (M_TRIM_THRESHOLD, 2 * GLIBC_LARGEST)):
            set_option(option, value)


def release() -> None:
    """Give memory that was freed back to the system: glibc keeps small blocks, and large ones by its own rules."""
    trim = getattr(_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _library() -> ctypes.CDLL | None:
    """The C library of this process, on Linux."""
    return ctypes.CDLL(None) if sys.platform == "linux" else None
