"""Finding the linear operations of a functional graph and making each one a module: a site.

A site is exactly an nn.Linear, an nn.ConvNd or a `GroupedLinear` that shares the model's parameter, called where the
graph had the operation. BackPACK looks its rules up by exact class, so nothing else will do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from curvscope.graph.operands import WHOLE, MatrixForm, Operand, Part, Reading, operand_of
from curvscope.graph.products import Operation, Shapes, find_product

aten = torch.ops.aten

ConvModule = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


class GroupedLinear(nn.Module):
    """Inputs [..., groups * d_in], each group with a weight of its own: weight [groups * d_out, d_in]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., groups * d_out]."""
        rows = x.unflatten(-1, (self.groups, 1, -1))
        weight = self.weight.unflatten(0, (self.groups, -1))
        out = torch.matmul(rows, weight.transpose(1, 2)).flatten(-3)
        return out if self.bias is None else out + self.bias


SiteModule = nn.Linear | GroupedLinear | ConvModule

CONVOLUTIONS = {
    aten.conv1d.default: 1,
    aten.conv2d.default: 2,
    aten.conv3d.default: 3,
    aten.conv1d.padding: 1,
    aten.conv2d.padding: 2,
    aten.conv3d.padding: 3,
}
TRANSPOSED_CONVOLUTIONS = {
    aten.conv_transpose1d.default: 1,
    aten.conv_transpose2d.input: 2,
    aten.conv_transpose3d.input: 3,
}


@dataclass
class Site:
    """One call of one linear operation.

    Attributes:
        target: the site's name as a submodule of the graph.
        layer: the name of the layer, that is the weight, it belongs to.
        kind: linear, conv1d, ..., conv_transpose3d; for a tap the operation it stands behind.
        module: the nn.Linear, nn.ConvNd or `GroupedLinear` that shares the parameter, or a `Tap`.
        part: the rows and columns of the layer's matrix that the call uses.
    """

    target: str
    layer: str
    kind: str
    module: Any
    part: Part = WHOLE


@dataclass
class LayerSpec:
    """One weight with its bias and all its sites.

    `form` is how the parameter is the matrix [d_out, d_in]; `bias` is None where the linear has none, where
    it is frozen, or where it is shared with something else. `selected` is whether --layers and --skip keep it.
    A layer that is `exact_only` has no Kronecker form: its weight is a row of all its `members` (name to size), and
    d_out is 1.
    """

    name: str
    kind: str
    weight: str
    bias: str | None
    d_in: int
    d_out: int
    form: MatrixForm | None
    sites: list[Site] = field(default_factory=list)
    groups: int = 1
    selected: bool = True
    exact_only: bool = False
    members: dict[str, int] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many numbers the layer trains: P. `d_in` counts the inputs of one output, within its group."""
        return self.d_out * (self.d_in + (self.bias is not None))


@dataclass(frozen=True)
class ParameterUse:
    """How one parameter tensor is treated: kronecker, frozen or uncovered, and why."""

    parameter: str
    layer: str
    count: int
    treatment: str
    reason: str = ""


class Leaf(nn.Module):
    """Cuts the graph behind a root site: its output is what the backward passes are taken with respect to.

    Whether a site is a root shows only as the pass runs: a comparison or a table look-up before it lets no gradient
    through, though other sites feed it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None
        self.cut = True

    def forward(self, tensor: Tensor) -> Tensor:
        """The same values as a fresh leaf that requires a gradient; the tensor itself where it already does."""
        if not self.cut or tensor.requires_grad or not torch.is_grad_enabled():
            self.value = None
            return tensor
        self.value = tensor.detach().requires_grad_()
        return self.value


def find_operations(graph: fx.Graph, shapes: Shapes) -> list[Operation]:
    """The graph's linear operations whose weight is a parameter or a view of one, in forward order."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function":
            operation = find_product(node, shapes) or _convolution(node, shapes)
            if operation is not None:
                found.append(operation)
    return found


def _convolution(node: fx.Node, shapes: Shapes) -> Operation | None:
    target: Any = node.target
    transposed = target in TRANSPOSED_CONVOLUTIONS
    dims = (TRANSPOSED_CONVOLUTIONS if transposed else CONVOLUTIONS).get(target)
    if dims is None:
        return None
    names: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    if transposed:
        names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    operand = operand_of(given["weight"], shapes)
    if operand is None or given["input"].meta["val"].ndim != dims + 2:
        return None
    groups = int(given.get("groups", 1))
    if transposed and groups > 1 and operand.chain:
        return None
    padding = given.get("padding", 0)
    options = {
        "stride": _tuple(given.get("stride", 1), dims),
        "padding": padding if isinstance(padding, str) else _tuple(padding, dims),
        "dilation": _tuple(given.get("dilation", 1), dims),
        "groups": groups,
    }
    kind, kernel = f"conv{dims}d", tuple(range(2, 2 + dims))
    reading = Reading(operand, (), (0,), (1, *kernel))
    if transposed:
        options["output_padding"] = _tuple(given.get("output_padding", 0), dims)
        kind, reading = f"conv_transpose{dims}d", Reading(operand, (), (1,), (0, *kernel))
        if groups > 1:
            split = operand.first_axis_split(groups)
            reading = Reading(split, (0,), (2,), (1, *(axis + 1 for axis in kernel)))
    return Operation(node, kind, reading, (given["input"],), (1,), given.get("bias"), options)


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values = [int(v) for v in (value if isinstance(value, Sequence) else [value])]
    return tuple(values * dims) if len(values) == 1 else tuple(values)


def site_module(kind: str, weight: Tensor, bias: Tensor | None, options: dict[str, Any], groups: int = 1) -> SiteModule:
    """An nn.Linear, nn.ConvNd or `GroupedLinear` around these tensors, which it shares, as the module stores them."""
    if kind == "linear" and groups > 1:
        return GroupedLinear(weight, bias, groups).eval()
    classes: dict[str, Any] = {
        "conv1d": nn.Conv1d,
        "conv2d": nn.Conv2d,
        "conv3d": nn.Conv3d,
        "conv_transpose1d": nn.ConvTranspose1d,
        "conv_transpose2d": nn.ConvTranspose2d,
        "conv_transpose3d": nn.ConvTranspose3d,
    }
    has_bias = bias is not None
    with torch.device("meta"):
        if kind == "linear":
            module: SiteModule = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias)
        else:
            many = options.get("groups", 1)
            channels = weight.shape[1] * many, weight.shape[0]
            if "transpose" in kind:
                channels = channels[::-1]
            module = classes[kind](*channels, tuple(weight.shape[2:]), bias=has_bias, **options)
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return module.eval()


def bias_places(bias: Operand, operation: Operation, node: fx.Node) -> Tensor | None:
    """For every row of the weight the entry of `bias` that is added to its outputs; None where that is not so.

    `node` is the addition (or the operation itself): `bias` must broadcast over all axes of its output that are not the
    weight's rows.
    """
    sizes = dict(zip(operation.out_axes, _row_sizes(operation), strict=True))
    if node is operation.node and operation.kind != "linear":
        lined = {0: operation.out_axes[0]}  # a convolution's own bias belongs to its channels
    else:
        rank = int(operation.node.meta["val"].ndim)
        lined = {axis: axis + rank - len(bias.sizes) for axis in range(len(bias.sizes))}
    own = {axis: sizes.get(out, 1) for axis, out in lined.items()}
    if any(bias.sizes[axis] != size for axis, size in own.items()) or not set(sizes) <= set(lined.values()):
        return None
    back = {out: axis for axis, out in lined.items()}
    return bias.places([back[out] for out in operation.out_axes])


def _row_sizes(operation: Operation) -> list[int]:
    """The sizes of the output's axes that are the weight's rows."""
    reading = operation.reading
    axes = (*reading.groups, *reading.outs)
    sizes = [reading.operand.sizes[axis] for axis in axes]
    if operation.kind != "linear":  # one axis of channels, groups and all
        return [math.prod(sizes)]
    return sizes


def spatial_dims(kind: str) -> int:
    """1, 2 or 3 for convolutions of either kind, 0 for linear."""
    return 0 if kind == "linear" else int(kind[-2])
