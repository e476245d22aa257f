"""Which axis of a classifier's outputs holds the classes: torch's second, or the last, as sequence models have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from curvscope.errors import BatchError, LossError

CLASS_AXES = ("second", "last")
SETTLE = "cross_entropy:class_axis=last (outputs [N, T, C]) or cross_entropy:class_axis=second ([N, C, T], torch's own)"
# Probabilities in float32 sum to 1 within a few hundred roundings, other sums of them hardly ever do.
SUM_TOLERANCE = 1e-3


def class_axis(name: str, settings: Mapping[str, Any], outputs: Tensor, targets: Tensor) -> int:
    """The axis of `outputs` that holds the classes of cross_entropy or causal_lm.

    For causal_lm it is the last. Otherwise the setting `class_axis` (second or last) says so, or what fits the targets:
    class indices have the outputs' shape without the class axis; class probabilities have the outputs' shape and sum to
    1 over it.

    Raises:
        LossError: both axes fit, or probabilities sum to 1 over neither, and no setting says which.
        BatchError: the shape of the targets fits no axis, or not the one that was set.
    """
    if name == "causal_lm":
        return outputs.ndim - 1
    given = settings.get("class_axis")
    choices = [given] if given is not None else list(CLASS_AXES)
    axes = {1 if choice == "second" else outputs.ndim - 1 for choice in choices}
    if targets.is_floating_point():
        fitting = {axis for axis in axes if targets.shape == outputs.shape}
        if len(fitting) > 1:
            fitting = {axis for axis in fitting if sums_to_one(targets, axis)}
    else:
        fitting = {axis for axis in axes if targets.shape == index_shape(outputs, axis)}
    if len(fitting) == 1:
        return fitting.pop()
    if fitting or (targets.is_floating_point() and targets.shape == outputs.shape):
        raise LossError(
            f"The classes may lie on axis 1 of the outputs or on the last: outputs {list(outputs.shape)} and targets "
            f"{list(targets.shape)} fit both."
            if fitting
            else f"The class probabilities {list(targets.shape)} sum to 1 neither over axis 1 nor over the last axis.",
            where="loss cross_entropy, model output",
            remedy=f"Say which axis holds the classes: {SETTLE}.",
        )
    raise _shape_error(outputs, targets, given, sorted(axes))


def index_shape(outputs: Tensor, axis: int) -> torch.Size:
    """The shape of class indices: the outputs' without the class axis."""
    return torch.Size([*outputs.shape[:axis], *outputs.shape[axis + 1 :]])


def next_tokens(settings: Mapping[str, Any], tokens: Tensor) -> Tensor:
    """Token ids [N, T] -> what the outputs [N, T, V] at each position are compared with: the token after it.

    The last position has none: there stands ignore_index.
    """
    return functional.pad(tokens[:, 1:].long(), (0, 1), value=settings["ignore_index"])


def sums_to_one(targets: Tensor, axis: int) -> bool:
    """Whether class probabilities do so over this axis."""
    return bool(((targets.sum(axis, dtype=torch.float64) - 1).abs() <= SUM_TOLERANCE).all())


def _shape_error(outputs: Tensor, targets: Tensor, given: str | None, axes: list[int]) -> BatchError:
    kind = str(targets.dtype).removeprefix("torch.")
    if targets.is_floating_point():
        expected = " or ".join(str(list(index_shape(outputs, axis))) for axis in axes)
        return BatchError(
            f"Targets must be class indices (int64, shape {expected}) or class probabilities (floating point, shape "
            f"{list(outputs.shape)}); got {kind}, shape {list(targets.shape)}.",
            where="targets",
            remedy="Convert class indices with targets.long(); for regression choose --loss mse.",
        )
    expected = " or ".join(f"{list(index_shape(outputs, axis))} (classes on axis {axis})" for axis in axes)
    other = given is not None and any(targets.shape == index_shape(outputs, axis) for axis in (1, outputs.ndim - 1))
    return BatchError(
        f"Class indices for outputs of shape {list(outputs.shape)} have shape {expected}; got {list(targets.shape)}.",
        where="targets" if given is None else f"targets, class_axis={given}",
        remedy=f"They fit the other axis: {SETTLE}." if other else "Give one class index for each term of the loss.",
    )
