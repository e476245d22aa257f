"""Shampoo's factors in an optimizer's state, by the names that its implementations give them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

NUMBERED = ("inv_precond_{}", "inv_pre_cond_{}")


def shampoo_factors(entry: Mapping[str, Any], shape: Sequence[int]) -> dict[str, Tensor]:
    """Shampoo's factor of each axis, as factor_0, factor_1, ... or, where the state holds them, inverse_0, ...

    Understood are L and R, lists under preconditioners, factor_matrices and their inverse forms, and the numbered
    inverses of torch_optimizer (inv_precond_0) and pytorch_optimizer (inv_pre_cond_0); their factors alone would not
    do, as these packages take other roots of them than the paper. Empty where the state has none, or where one does
    not have its axis's size.
    """
    for key, name in (("inv_factor_matrices", "inverse"), ("inv_preconditioners", "inverse"),
                      ("factor_matrices", "factor"), ("preconditioners", "factor")):  # fmt: skip
        listed = entry.get(key)
        if isinstance(listed, (list, tuple)) and _square(listed, shape):
            return {f"{name}_{axis}": tensor.detach() for axis, tensor in enumerate(listed)}
    for pattern in NUMBERED:
        numbered = [entry.get(pattern.format(axis)) for axis in range(len(shape))]
        if _square(numbered, shape):
            whole = [tensor for tensor in numbered if isinstance(tensor, Tensor)]
            return {f"inverse_{axis}": tensor.detach() for axis, tensor in enumerate(whole)}
    pair = [entry.get("L"), entry.get("R")]
    if _square(pair, shape):
        return {f"factor_{axis}": tensor.detach() for axis, tensor in enumerate(pair)}  # type: ignore[union-attr]
    return {}


def _square(tensors: Sequence[Any], shape: Sequence[int]) -> bool:
    return len(tensors) == len(shape) > 0 and all(
        isinstance(tensor, Tensor) and tuple(tensor.shape) == (size, size)
        for tensor, size in zip(tensors, shape, strict=True)
    )


def feeds_back(entries: Iterable[Any]) -> bool:
    """Whether it is a Shampoo whose momentum goes through the preconditioner again: that of the numbered inverses."""
    return any(isinstance(entry, Mapping) and pattern.format(0) in entry for entry in entries for pattern in NUMBERED)
