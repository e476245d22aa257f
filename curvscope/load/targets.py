"""Whether the targets suit the loss and the model's outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvscope.errors import BatchError, LossError
from curvscope.load.importing import describe
from curvscope.load.problem import Loss


def check_targets(loss: Loss, outputs: Tensor, targets: Any) -> None:
    """Refuse targets that do not suit the loss and the model's outputs.

    Raises:
        BatchError: dtype, shape or range of the targets, with what was expected and what was got.
        LossError: settings that do not fit the outputs, or a callable that fails or returns no finite scalar.
    """
    if loss.name == "callable":
        _check_callable(loss, outputs, targets)
        return
    if not isinstance(targets, Tensor):
        raise BatchError(
            f"{loss.name} needs its targets as a tensor; got {type(targets).__name__}.",
            where="targets",
            remedy="Give the targets as one tensor, or a callable loss that takes what you have.",
        )
    if loss.name == "cross_entropy":
        _check_cross_entropy(loss, outputs, targets)
    else:
        _check_same_shape(loss, outputs, targets)


def _check_cross_entropy(loss: Loss, outputs: Tensor, targets: Tensor) -> None:
    if outputs.ndim < 2:
        raise LossError(
            f"cross_entropy needs outputs of shape [N, C, ...]; the model returns {list(outputs.shape)}.",
            where="loss cross_entropy, model output",
            remedy="Choose mse or bce_with_logits for single outputs, or return one column a class.",
        )
    classes = outputs.shape[1]
    weight = loss.settings["weight"]
    if weight is not None and tuple(weight.shape) != (classes,):
        raise LossError(
            f"weight must have one number a class: expected shape [{classes}], got {list(weight.shape)}.",
            where="loss cross_entropy, weight",
            remedy="Give the class weights that training used.",
        )
    index_shape = (outputs.shape[0], *outputs.shape[2:])
    if targets.is_floating_point():
        _check_probabilities(loss, outputs, targets, index_shape)
        return
    if targets.dtype not in (torch.int64, torch.uint8):
        raise BatchError(
            f"Class indices must be int64; got {_name(targets.dtype)}.",
            where="targets",
            remedy="Convert them with targets.long().",
        )
    if tuple(targets.shape) != index_shape:
        swapped = outputs.ndim > 2 and tuple(targets.shape) == tuple(outputs.shape[:-1])
        raise BatchError(
            f"Class indices for outputs of shape {list(outputs.shape)} have shape {list(index_shape)}; "
            f"got {list(targets.shape)}.",
            where="targets",
            remedy="The class axis of the outputs is axis 1: let the model return outputs.transpose(1, -1), "
            "or "
            "give a callable loss that does it."
            if swapped
            else "Give one class index for each term of the loss.",
        )
    ignored = targets == loss.settings["ignore_index"]
    wrong = ~ignored & ((targets < 0) | (targets >= classes))
    if bool(wrong.any()):
        index = [int(i) for i in wrong.nonzero()[0]]
        raise BatchError(
            f"Targets must lie between 0 and {classes - 1} ({classes} outputs); got "
            f"{int(targets[tuple(index)])} "
            f"at index {index}, {int(wrong.sum())} of {targets.numel()} in all.",
            where="targets",
            remedy="Number the classes from 0, or name the value to leave out: cross_entropy:ignore_index=...",
        )
    if bool(ignored.all()):
        raise BatchError(
            f"Every target is ignore_index ({loss.settings['ignore_index']}): the loss has no term.",
            where="targets",
            remedy="Choose a batch with at least one target that counts.",
        )


def _check_probabilities(loss: Loss, outputs: Tensor, targets: Tensor, index_shape: tuple[int, ...]) -> None:
    if targets.shape != outputs.shape:
        raise BatchError(
            f"Targets must be class indices (int64, shape {list(index_shape)}) or class probabilities "
            f"(floating point, shape {list(outputs.shape)}); got {_name(targets.dtype)}, shape "
            f"{list(targets.shape)}.",
            where="targets",
            remedy="Convert class indices with targets.long(); for regression choose --loss mse.",
        )
    if loss.settings["ignore_index"] >= 0:
        raise LossError(
            "ignore_index has no meaning when the targets are class probabilities.",
            where="loss cross_entropy, ignore_index",
            remedy="Leave it out, or give class indices.",
        )
    if bool((targets < 0).any()):
        raise BatchError(
            f"Class probabilities must not be negative; the smallest is {float(targets.min()):g}.",
            where="targets",
            remedy="Give probabilities that sum to 1 over the classes.",
        )


def _check_same_shape(loss: Loss, outputs: Tensor, targets: Tensor) -> None:
    if targets.shape != outputs.shape:
        raise BatchError(
            f"{loss.name} compares number with number: expected targets of shape {list(outputs.shape)} (the "
            "outputs'), "
            f"got {list(targets.shape)}.",
            where="targets",
            remedy="Reshape the targets; silent broadcasting would train on something else.",
        )
    if targets.is_complex() or (loss.name == "bce_with_logits" and not targets.is_floating_point()):
        raise BatchError(
            f"{loss.name} needs floating point targets; got {_name(targets.dtype)}.",
            where="targets",
            remedy="Convert them with targets.float().",
        )
    if loss.name != "bce_with_logits":
        return
    outside = (targets < 0) | (targets > 1)
    if bool(outside.any()):
        index = [int(i) for i in outside.nonzero()[0]]
        raise BatchError(
            f"Targets must lie between 0 and 1; got {float(targets[tuple(index)]):g} at index {index}.",
            where="targets",
            remedy="Give probabilities, or choose --loss mse.",
        )
    for key in ("weight", "pos_weight"):
        weight = loss.settings[key]
        if weight is None:
            continue
        try:
            fits = torch.broadcast_shapes(weight.shape, outputs.shape) == outputs.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise LossError(
                f"{key} of shape {list(weight.shape)} does not broadcast to the outputs' {list(outputs.shape)}.",
                where=f"loss bce_with_logits, {key}",
                remedy="Give one number for each output column, as training did.",
            )


def _check_callable(loss: Loss, outputs: Tensor, targets: Any) -> None:
    try:
        with torch.no_grad():
            value = loss(outputs.detach(), targets)
    except Exception as cause:
        raise LossError(
            f"The loss failed on the model's outputs: {describe(cause)}.",
            where=f"loss {loss.label}, outputs of shape {list(outputs.shape)}",
            remedy="It is called as loss(outputs, targets) with the outputs and targets of the whole batch.",
        ) from cause
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise LossError(
            f"A loss must return one number, a scalar tensor; got {got}.",
            where=f"loss {loss.label}",
            remedy="Reduce it with .mean() or .sum(), as training did.",
        )
    if not bool(torch.isfinite(value).all()):
        raise LossError(
            f"The loss is {float(value)} on this batch.",
            where=f"loss {loss.label}",
            remedy="Look for divisions by zero or logarithms of zero in the loss.",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
