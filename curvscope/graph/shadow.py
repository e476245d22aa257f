"""A working copy of a model that shares its weights: what lets the user's own object stay untouched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from curvscope.errors import ModelError
from curvscope.graph.lookups import rescaling

# Where a transformers config says how experts are computed. Its grouped product takes no float64, and sorts the rows by
# expert; the batched one multiplies every token with the weights of its own experts, in the order of the tokens.
EXPERTS = "_experts_implementation"


def shadow(model: nn.Module, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """A structural copy of `model` in eval mode, on `device` and in `dtype`.

    Parameters are aliases (`p.detach()`, the same storage) wherever device and dtype already agree; buffers are
    clones, since a forward pass may write to them. So are the weights of embeddings with `max_norm`, whose rows a
    forward pass rescales in place (see `curvscope.graph.lookups`). Neither mode, `requires_grad`, hooks nor values of
    `model` change, now or later. Mixtures of experts of transformers compute the same in another way (`EXPERTS`).

    Raises:
        ModelError: the module holds something that can't be copied (an open file, a lock, ...).
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(
            _moved(parameter.detach(), device, dtype), requires_grad=parameter.requires_grad
        )
    for module in rescaling(model):
        weight = _moved(module.weight.detach(), device, dtype).clone()
        memo[id(module.weight)] = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _moved(buffer.detach().clone(), device, dtype)
    for module in model.modules():
        for value in vars(module).values():
            # Plain tensor attributes: weights computed by old-style weight_norm, constants, cached masks.
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = _moved(value.detach().clone(), device, dtype)
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"The model can't be copied structurally: {error}",
            where=f"{type(model).__name__} (copy.deepcopy; its weights are shared, not copied)",
            remedy="Remove what can't be copied (open files, locks, process groups) from the module's attributes.",
        ) from error
    for copied in twin.modules():
        if getattr(config := getattr(copied, "config", None), EXPERTS, None) == "grouped_mm":
            setattr(config, EXPERTS, "batched_mm")
    return twin.eval()


def _moved(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    """The tensor on the device, floating types cast; the same storage where nothing changes."""
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def moved(value: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """Tensors of a nested structure on the device, floating ones cast; everything else as it is."""
    return torch.utils._pytree.tree_map(
        lambda item: _moved(item.detach(), device, dtype) if isinstance(item, Tensor) else item, value
    )
