"""Finding the linear operations of a functional graph and making each one a module: a site.

A site is exactly an nn.Linear, nn.ConvNd or nn.Embedding that shares the model's parameter, called where the graph had
the operation. BackPACK looks its rules up by exact class, so nothing else will do. A look-up counts as linear: its
inputs are one-hot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten

ConvModule = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
SiteModule = nn.Linear | ConvModule | nn.Embedding

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
PRODUCTS = (aten.mm.default, aten.matmul.default)
SAME_VALUES = (
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
)
TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default)
NORMALISATIONS = ("layer_norm", "batch_norm", "group_norm", "instance_norm", "rms_norm")


@dataclass
class Site:
    """One call of one linear operation.

    Attributes:
        target: the site's name as a submodule of the graph.
        layer: the name of the layer, that is the weight, it belongs to.
        kind: linear, conv1d, ..., conv_transpose3d, embedding; for a tap the operation it stands behind.
        module: the nn.Linear, nn.ConvNd or nn.Embedding that shares the parameter, or a `Tap`.
        role: what the weight is used as here, in a layer of several roles (`role_name`).
    """

    target: str
    layer: str
    kind: str
    module: Any
    role: str = ""


@dataclass
class LayerSpec:
    """One weight with its bias and all its sites.

    `transposed` says that the parameter is stored [d_in, d_out]; `bias` is None where the linear has none, where
    it is frozen, or where it is shared with something else. `selected` is whether --layers and --skip keep it.
    A layer that is `exact_only` has no Kronecker form: its weight is a row of all its `members` (name to size), and
    d_out is 1. `roles` is empty but where the weight is used in several ways: then it maps each role to whether its
    weight is the transpose of the layer's, which has the orientation of the first role; such a layer has no bias.
    """

    name: str
    kind: str
    weight: str
    bias: str | None
    d_in: int
    d_out: int
    transposed: bool
    sites: list[Site] = field(default_factory=list)
    groups: int = 1
    selected: bool = True
    exact_only: bool = False
    members: dict[str, int] = field(default_factory=dict)
    roles: dict[str, bool] = field(default_factory=dict)

    def role(self, name: str) -> LayerSpec:
        """One role as a layer of its own: the sites that use the weight so."""
        sites = [site for site in self.sites if site.role == name]
        d_in, d_out = (self.d_out, self.d_in) if self.roles[name] else (self.d_in, self.d_out)
        transposed = self.transposed != self.roles[name]
        return LayerSpec(self.name, sites[0].kind, self.weight, None, d_in, d_out, transposed, sites)

    @property
    def trained(self) -> list[str]:
        """The names of its parameters."""
        return list(self.members) or [name for name in (self.weight, self.bias) if name is not None]

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


@dataclass(frozen=True)
class _Operation:
    """A linear operation as the graph states it, before it becomes a site."""

    node: fx.Node
    kind: str
    weight: str
    transposed: bool
    x: fx.Node
    x_transposed: bool
    bias: Any
    options: dict[str, Any]


def find_operations(graph: fx.Graph, parameters: set[str]) -> list[_Operation]:
    """The graph's linear operations whose weight is a parameter, in forward order."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function":
            operation = (
                _linear(node, parameters)
                or _product(node, parameters)
                or _convolution(node, parameters)
                or _lookup(node, parameters)
            )
            if operation is not None:
                found.append(operation)
    return found


def parameter_of(node: Any, parameters: set[str]) -> tuple[str, bool] | None:
    """The parameter behind a node and whether it arrives transposed; None if it is anything else."""
    transposed = False
    while isinstance(node, fx.Node):
        if node.op == "get_attr":
            return (str(node.target), transposed) if str(node.target) in parameters else None
        if node.op != "call_function":
            return None
        if node.target in TRANSPOSES:
            if not _swaps_two_axes(node):
                return None
            transposed = not transposed
        elif node.target not in SAME_VALUES:
            return None
        node = node.args[0]
    return None


def _swaps_two_axes(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if value is None or value.ndim != 2:
        return False
    if node.target is aten.permute.default:
        return [axis % 2 for axis in _sequence(node.args[1])] == [1, 0]
    if node.target is aten.transpose.int:
        first, second = (int(str(axis)) for axis in node.args[1:3])
        return first % 2 != second % 2
    return True


def _sequence(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value]


def _linear(node: fx.Node, parameters: set[str]) -> _Operation | None:
    if node.target is not aten.linear.default:
        return None
    args: list[Any] = list(node.args)
    weight = parameter_of(args[1], parameters)
    if weight is None or args[1].meta["val"].ndim != 2:
        return None
    bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
    return _Operation(node, "linear", weight[0], weight[1], args[0], False, bias, {})


def _product(node: fx.Node, parameters: set[str]) -> _Operation | None:
    """addmm, mm and matmul: `x @ w` has the weight transposed; in `w @ x` the rows are the columns of x."""
    bias = None
    args: list[Any] = list(node.args)
    if node.target is aten.addmm.default:
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            return None
        bias = args.pop(0)
    elif node.target not in PRODUCTS:
        return None
    left, right = args[:2]
    weight = parameter_of(right, parameters)
    if weight is not None and right.meta["val"].ndim == 2 and left.meta["val"].ndim >= 2:
        return _Operation(node, "linear", weight[0], not weight[1], left, False, bias, {})
    weight = parameter_of(left, parameters)
    if bias is None and weight is not None and left.meta["val"].ndim == 2 and right.meta["val"].ndim >= 2:
        return _Operation(node, "linear", weight[0], weight[1], right, True, None, {})
    return None


def _convolution(node: fx.Node, parameters: set[str]) -> _Operation | None:
    target: Any = node.target
    transposed = target in TRANSPOSED_CONVOLUTIONS
    dims = (TRANSPOSED_CONVOLUTIONS if transposed else CONVOLUTIONS).get(target)
    if dims is None:
        return None
    names: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    if transposed:
        names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    weight = parameter_of(given["weight"], parameters)
    groups = int(given.get("groups", 1))
    if weight is None or weight[1] or (transposed and groups != 1):
        return None
    if given["input"].meta["val"].ndim != dims + 2:
        return None
    padding = given.get("padding", 0)
    options = {
        "stride": _tuple(given.get("stride", 1), dims),
        "padding": padding if isinstance(padding, str) else _tuple(padding, dims),
        "dilation": _tuple(given.get("dilation", 1), dims),
        "groups": groups,
    }
    kind = f"conv{dims}d"
    if transposed:
        options["output_padding"] = _tuple(given.get("output_padding", 0), dims)
        kind = f"conv_transpose{dims}d"
    return _Operation(node, kind, weight[0], transposed, given["input"], False, given.get("bias"), options)


def _lookup(node: fx.Node, parameters: set[str]) -> _Operation | None:
    if node.target is not aten.embedding.default:
        return None
    args: list[Any] = list(node.args)
    weight = parameter_of(args[0], parameters)
    index = args[1].meta.get("val")
    if weight is None or weight[1] or not isinstance(index, Tensor) or index.ndim == 0:
        return None
    given: Any = args[2] if len(args) > 2 else node.kwargs.get("padding_idx", -1)
    row = int(given)
    return _Operation(
        node, "embedding", weight[0], True, args[1], False, None, {"padding_idx": row if row >= 0 else None}
    )


def role_name(kind: str, transposed: bool, beside: Sequence[str]) -> str:
    """What a weight is used as, for weights with several uses (`beside`: their kinds).

    embedding: rows are looked up. head: the linear layer y = W x beside an embedding that stores W. linear and
    transposed: y = W x and y = W^T x, W as it is stored.
    """
    if kind != "linear":
        return kind
    if transposed:
        return "transposed"
    return "head" if "embedding" in beside else "linear"


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    values = [int(v) for v in _sequence(value)]
    return tuple(values * dims) if len(values) == 1 else tuple(values)


def site_module(kind: str, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> SiteModule:
    """A module of the kind around these tensors, which it shares; the weight as the module itself stores it."""
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
        elif kind == "embedding":
            module = nn.Embedding(weight.shape[0], weight.shape[1], **options)
        else:
            channels = weight.shape[1] * options.get("groups", 1), weight.shape[0]
            if "transpose" in kind:
                channels = weight.shape[0], weight.shape[1]
            module = classes[kind](*channels, tuple(weight.shape[2:]), bias=has_bias, **options)
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        module.register_parameter("bias", nn.Parameter(bias.detach(), requires_grad=False))
    return module.eval()


def output_size(kind: str, shape: torch.Size) -> int:
    """d_out of a weight as the module itself stores it."""
    return shape[1 if "transpose" in kind or kind == "embedding" else 0]


def added_bias(node: fx.Node, kind: str, d_out: int, parameters: set[str], shapes: dict[str, torch.Size]) -> str | None:
    """The parameter added to all rows of this node right after it, if there is one and nothing else reads it."""
    users = list(node.users)
    if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0].kwargs.get("alpha", 1) != 1:
        return None
    left, right = users[0].args
    found = parameter_of(right if left is node else left, parameters)
    if found is None or found[1]:
        return None
    shape = list(shapes[found[0]])
    if kind == "linear":
        fits = shape[-1:] == [d_out] and math.prod(shape) == d_out
    else:
        spatial = spatial_dims(kind)
        fits = math.prod(shape) == d_out and shape[-1 - spatial :] == [d_out] + [1] * spatial
    return found[0] if fits else None


def spatial_dims(kind: str) -> int:
    """1, 2 or 3 for convolutions of either kind, 0 for linear and embedding."""
    return int(kind[-2]) if "conv" in kind else 0


def why_uncovered(users: Sequence[fx.Node]) -> str:
    """In words, what the parameter is used for instead of as a linear layer's weight."""
    if not users:
        return "this forward pass does not reach it"
    name = str(users[0].target).removeprefix("aten.").split(".")[0]
    if any(norm in name for norm in NORMALISATIONS):
        return f"normalisation ({name}): no Kronecker form; its exact block is not computed yet"
    if name == "embedding":
        return "an embedding whose rows are looked up in a way that is not covered yet"
    if "conv" in name:
        return f"{name} of a form that is not covered yet (grouped transposed, computed weight)"
    if name in ("add", "mul", "sub", "expand", "cat"):
        return f"free parameter ({name}): no Kronecker form; its exact block is not computed yet"
    if name in ("linear", "addmm", "mm", "matmul", "bmm", "einsum"):
        return f"{name} with a form that is not covered yet"
    return f"used by {name}: its weight is computed or of a kind not covered yet"
