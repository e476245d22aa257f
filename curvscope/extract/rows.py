"""The rows of a site: what K-FAC calls a[n, r] and g[n, r].

For a convolution r runs over output positions and a[n, r] is the patch of input that the kernel sees there, in the
order of `weight.flatten(1)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvscope.graph.layout import Layout
from curvscope.graph.sites import ConvModule, SiteModule


@dataclass(frozen=True)
class SiteRows:
    """How one site's tensors become rows, examples first."""

    module: SiteModule
    layout: Layout

    def inputs(self, tensor: Tensor) -> Tensor:
        """A without the constant 1, [N, R, d_in]; a view for linear sites wherever strides allow."""
        if isinstance(self.module, nn.Linear):
            return self.layout.rows(tensor)
        return _merge(patches(self.module, tensor), self.layout)

    def outputs(self, tensor: Tensor) -> Tensor:
        """g, [N, R, d_out]."""
        if isinstance(self.module, nn.Linear):
            return self.layout.rows(tensor)
        # [B, d_out, *spatial] as [B, L, d_out], a view: rows run along memory
        return _merge(tensor.flatten(2).transpose(1, 2), self.layout)


def _merge(rows: Tensor, layout: Layout) -> Tensor:
    """[B, L, d] with B = outer * N * inner -> [N, R, d]."""
    if layout.outer * layout.inner == 1:
        return rows
    return layout.rows(rows)


def patches(module: ConvModule, tensor: Tensor) -> Tensor:
    """The input patches of a convolution, [B, L, C_in * prod(kernel)], a view of memory laid out [d_in, B, L]."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    dims = len(kernel)
    for axis, amount in enumerate(_padding(module)):
        if any(amount):
            before = [0, 0] * (dims - 1 - axis)
            tensor = F.pad(tensor, [*before, *amount])
    for axis in range(dims):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        tensor = tensor.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    # [B, C, *positions, *kernel] -> [C, *kernel, B, *positions]
    order = [1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims)]
    batch = tensor.shape[0]
    moved = tensor.permute(order).reshape(tensor.shape[1] * _product(kernel), batch, -1)
    return moved.permute(1, 2, 0)


def _padding(module: ConvModule) -> list[tuple[int, int]]:
    """Zeros before and after each spatial axis; "same" puts the odd one after, as torch does."""
    padding = module.padding
    if isinstance(padding, str):
        if padding == "valid":
            return [(0, 0)] * len(module.kernel_size)
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(amount, amount) for amount in padding]


def _product(values: tuple[int, ...]) -> int:
    return int(torch.Size(values).numel())
