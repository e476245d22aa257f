"""A forward pass whose own casts to a narrower floating type (`x.half()`, `x.to(torch.bfloat16)`) give the run's dtype.

A checkpoint in half precision whose forward pass casts its inputs to half can't run with its weights in float32: the
products see two dtypes. The casts are widened with the weights, as `unlift.tidy` does with those of an exported graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from curvscope.errors import BatchError, ModelError

NARROWING = {Tensor.half: torch.float16, Tensor.bfloat16: torch.bfloat16, Tensor.float: torch.float32}


class Widened(TorchFunctionMode):
    """Inside, floating types narrower than `dtype` are `dtype`, wherever a torch function is asked for one.

    `kinds` are those that were asked for.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.kinds: set[torch.dtype] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The function's value, its floating types widened."""
        wanted = NARROWING.get(func)
        if wanted is not None and args and widened(wanted, self.dtype) is self.dtype:
            self.kinds.add(wanted)
            return args[0].to(self.dtype)
        args, kwargs = pytree.tree_map(self._widened, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    def _widened(self, item: Any) -> Any:
        found = widened(item, self.dtype)
        if found is not item:
            self.kinds.add(item)
        return found


def widened(item: Any, dtype: torch.dtype) -> Any:
    """`dtype` in place of a narrower floating type; anything else as it is."""
    if isinstance(item, torch.dtype) and item.is_floating_point and torch.finfo(item).bits < torch.finfo(dtype).bits:
        return dtype
    return item


def casts_in(graph: fx.Graph) -> set[torch.dtype]:
    """The types of half precision that an exported graph casts to."""
    found = {node.kwargs.get("dtype") for node in graph.nodes if node.op == "call_function"}
    return {kind for kind in (torch.bfloat16, torch.float16) if kind in found}


def own_casts(refusal: BatchError, dtype: torch.dtype) -> ModelError:
    """The error for a model whose own casts can't be widened in its graph, as it has none."""
    name = str(dtype).removeprefix("torch.")
    return ModelError(
        f"The forward pass casts to another floating type than {name}, in which its weights are analyzed: "
        f"{refusal.what.partition(': ')[2]}; and torch.export, in whose graph such casts are widened, refuses it.",
        where=refusal.where,
        remedy="Let it cast to a weight's own type: x.to(self.weight.dtype) in place of x.half() and the like.",
    )
