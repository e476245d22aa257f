"""Why a parameter is not covered, in words that are true of it."""

from __future__ import annotations

from torch import fx

UNREACHED = "this forward pass does not reach it"
LINEAR = ("linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "einsum", "bilinear", "_trilinear")


def operation_name(node: fx.Node) -> str:
    """The operation without its package and overload."""
    return str(node.target).removeprefix("aten.").split(".")[0]


def is_product(node: fx.Node) -> bool:
    """Whether the operation is linear in a weight: a matrix product or a convolution."""
    name = operation_name(node)
    return name in LINEAR or "conv" in name


def why_no_tap(end: fx.Node, source: fx.Node) -> str:
    """Why what a parameter is used for gives it no exact block: `source` is it, or a value computed from it."""
    name = operation_name(end)
    if source.op != "get_attr":
        return f"what is computed from it ({operation_name(source)}) is used by {name}: no exact block is computed"
    return f"used by {name}, for which no exact block is computed"


def why_exact_only(kind: str, parameter: str) -> str:
    """Why a parameter that has an exact block has no Kronecker factors, where its layer's kind does not say so."""
    word, _, product = kind.partition(" ")
    if word != "computed":
        return ""
    through = ""
    if "parametrizations" in parameter:
        through = " (a parametrization)"
    elif parameter.endswith(("weight_g", "weight_v")):
        through = " (weight_norm)"
    elif parameter.endswith("_orig"):
        through = " (spectral_norm or pruning)"
    return f"the weight of the {product} is computed from it{through}: it is no layer's weight itself"
