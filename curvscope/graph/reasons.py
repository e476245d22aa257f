"""Why a parameter is not covered, in words that are true of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

UNREACHED = "this forward pass does not reach it"
LINEAR = ("linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "einsum", "bilinear", "_trilinear")


def operation_name(node: fx.Node) -> str:
    """The operation without its package and overload."""
    return str(node.target).removeprefix("aten.").split(".")[0]


def why_no_tap(end: fx.Node, source: fx.Node, parameter: str) -> str:
    """Why what a parameter is used for gives it no exact block: `source` is it, or a value computed from it."""
    name = operation_name(end)
    is_weight = name in LINEAR or "conv" in name
    if source.op != "get_attr":
        through = operation_name(source)
        if "parametrizations" in parameter:
            through = "a parametrization"
        elif parameter.endswith(("weight_g", "weight_v")):
            through = "weight_norm"
        elif parameter.endswith("_orig"):
            through = "spectral_norm or pruning"
        if is_weight:
            return f"the weight of a {name} is computed from it ({through}), so that it is no layer's weight itself"
        return f"what is computed from it ({through}) is used by {name}, for which no exact block is computed"
    if is_weight:
        return f"read by {name} in a form that is no plain linear operation: no exact block is computed"
    if name == "embedding":
        return "an embedding with padding_idx, whose padding row gets no gradient: no exact block is computed"
    return f"used by {name}, for which no exact block is computed"


def why_blocked(others: Sequence[fx.Node]) -> str:
    """Why a linear operation's weight that something else reads, too, is no layer."""
    return f"tied in two roles (also read by {operation_name(others[0])}): not covered yet"
