"""The rows of a site: what K-FAC calls a[n, r] and g[n, r].

For a convolution r runs over output positions and a[n, r] is the patch of input that the kernel sees there, in the
order of `weight.flatten(1)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from curvscope.graph.layout import Layout
from curvscope.graph.sites import ConvModule, GroupedLinear, SiteModule

LINEAR = (nn.Linear, GroupedLinear)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class SiteRows:
    """How one site's tensors become rows, examples first."""

    module: SiteModule
    layout: Layout

    def inputs(self, tensor: Tensor) -> Float[Tensor, "N R d_in"]:
        """The inputs a without the constant 1, [N, R, d_in]; a view for linear sites wherever strides allow."""
        if isinstance(self.module, LINEAR):
            return self.layout.rows(tensor)
        return _merge(patches(self.module, tensor), self.layout)

    def real(self, tensor: Tensor) -> Bool[Tensor, "N R"] | None:
        """Which of `inputs` are rows of the layer and not empty slots; None where all are."""
        if type(self.layout) is Layout:
            return None  # without making a convolution's patches a second time
        return self.layout.real(tensor if isinstance(self.module, LINEAR) else patches(self.module, tensor))

    def outputs(self, tensor: Tensor) -> Float[Tensor, "N R d_out"]:
        """The output gradients g, [N, R, d_out]."""
        if isinstance(self.module, LINEAR):
            return self.layout.rows(tensor)
        # [B, d_out, *spatial] as [B, L, d_out], a view: rows run along memory
        return _merge(tensor.flatten(2).transpose(1, 2), self.layout)


def _merge(rows: Tensor, layout: Layout) -> Tensor:
    """[B, L, d] with B = outer * N * inner -> [N, R, d]."""
    if layout == Layout(0):
        return rows
    return layout.rows(rows)


def patches(module: ConvModule, tensor: Float[Tensor, "B C_in *positions"]) -> Float[Tensor, "B L d_in"]:
    """The input patches of a convolution, [B, L, C_in * prod(kernel)], a view of memory laid out [d_in, B, L]."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    dims = len(kernel)
    transposed = isinstance(module, TRANSPOSED)
    if transposed:
        # y = W^T x spread by the stride: the same as a plain convolution of the spread input with the kernel reversed
        tensor = _spread(tensor, stride)
        stride = (1,) * dims
    for axis, amount in enumerate(_padding(module)):
        if any(amount):
            before = [0, 0] * (dims - 1 - axis)
            tensor = F.pad(tensor, [*before, *amount])
    for axis in range(dims):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        tensor = tensor.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    if transposed:
        tensor = tensor.flip(list(range(2 + dims, 2 + 2 * dims)))
    # [B, C, *positions, *kernel] -> [C, *kernel, B, *positions]
    order = [1, *range(2 + dims, 2 + 2 * dims), 0, *range(2, 2 + dims)]
    batch = tensor.shape[0]
    moved = tensor.permute(order).reshape(tensor.shape[1] * _product(kernel), batch, -1)
    return moved.permute(1, 2, 0)


def _spread(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Stride - 1 zeros between neighbours along each spatial axis."""
    sizes = [(size - 1) * step + 1 for size, step in zip(tensor.shape[2:], stride, strict=True)]
    wide = tensor.new_zeros(*tensor.shape[:2], *sizes)
    steps: list[Any] = [slice(None, None, step) for step in stride]
    where: tuple[Any, ...] = (Ellipsis, *steps)
    wide[where] = tensor
    return wide


def _padding(module: ConvModule) -> list[tuple[int, int]]:
    """Zeros before and after each spatial axis; "same" puts the odd one after, as torch does."""
    padding = module.padding
    if isinstance(module, TRANSPOSED):
        reaches = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        rest: Any = zip(module.padding, module.output_padding, strict=True)
        return [(reach - pad, reach - pad + more) for reach, (pad, more) in zip(reaches, rest, strict=True)]
    if isinstance(padding, str):
        if padding == "valid":
            return [(0, 0)] * len(module.kernel_size)
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(amount, amount) for amount in padding]


def _product(values: tuple[int, ...]) -> int:
    return int(torch.Size(values).numel())
