"""Gradients of an operation's operand for every example, by running the operation again.

For example n: the vector-Jacobian product of the operation with the output gradient at n's rows. Where the operation
treats the examples apart (which is checked, not assumed), it is run on one example's inputs at a time, so that a column
costs one pass through it; elsewhere on all of them, N passes a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvscope.graph.layout import Layout
from curvscope.graph.replay import Replay


class Replayed:
    """One operation on one batch; `arguments` are the operand and the other inputs, `output` what came out."""

    def __init__(self, replay: Replay, arguments: Sequence[Any], output: Tensor, layout: Layout) -> None:
        self.layout = layout
        operand, *inputs = arguments
        with torch.enable_grad():
            self.operand: Tensor = operand.detach().requires_grad_()
            self.whole = replay(self.operand, *inputs)
            self.each = self._one_by_one(replay, inputs, output.detach())

    def gradients(self, gradient: Tensor) -> Tensor:
        """[N, numbers of the operand], from the operation's output gradient."""
        if self.each is not None:
            pairs = zip(self.each, _examples(gradient, self.layout), strict=True)
            return torch.stack([self._pulled(output, own) for output, own in pairs])
        flat = self.layout.flat(gradient)
        found = []
        for example in range(flat.shape[0]):
            own = torch.zeros_like(flat)
            own[example] = flat[example]
            found.append(self._pulled(self.whole, self.layout.unflat(own, gradient)))
        return torch.stack(found)

    def _pulled(self, output: Tensor, gradient: Tensor) -> Tensor:
        if not output.requires_grad:
            return torch.zeros_like(self.operand).flatten()
        (found,) = torch.autograd.grad(output, [self.operand], gradient, retain_graph=True, materialize_grads=True)
        return found.detach().flatten()

    def _one_by_one(self, replay: Replay, inputs: Sequence[Any], output: Tensor) -> list[Tensor] | None:
        """The operation's outputs for each example alone, if they and their gradients are those of the whole."""
        if type(self.layout) is not Layout:
            return None
        parts = [_parts(given, output, self.layout) for given in inputs]
        wanted = _examples(output, self.layout)
        found = []
        try:
            for example, want in enumerate(wanted):
                got = replay(self.operand, *(part[example % len(part)] for part in parts))
                if got.shape != want.shape or not _close(got, want):
                    return None
                found.append(got)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return None  # sizes of the whole batch are built in
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(output)
        apart = sum(self._pulled(got, own) for got, own in zip(found, _examples(weights, self.layout), strict=True))
        return found if _close(torch.as_tensor(apart), self._pulled(self.whole, weights)) else None


def _examples(tensor: Tensor, layout: Layout) -> list[Tensor]:
    """Every example's part, with the tensor's axes."""
    return [part.flatten(layout.axis, layout.axis + 1) for part in layout.split(tensor)]


def _parts(given: Any, output: Tensor, layout: Layout) -> list[Any]:
    """What an input may be for each example; one item where it is the same for all."""
    rows = output.shape[layout.axis]
    examples = rows // (layout.outer * layout.inner)
    if isinstance(given, int) and not isinstance(given, bool) and given == rows:
        return [rows // examples]
    if not isinstance(given, Tensor):
        return [given]
    if given.ndim > layout.axis and given.shape[layout.axis] == rows:
        return _examples(given, layout)
    for axis, size in enumerate(given.shape):
        if size == rows:
            return _examples(given, layout.on_axis(axis))
    for axis, size in enumerate(given.shape):
        if size == examples:
            return _examples(given, Layout(axis))
    return [given]


def _close(got: Tensor, want: Tensor) -> bool:
    """Equal to rounding."""
    tolerance = torch.finfo(want.dtype).eps ** 0.5 / 100
    size = float(want.abs().max()) if want.numel() else 0.0
    return not want.numel() or float((got.detach() - want).abs().max()) <= tolerance * size
