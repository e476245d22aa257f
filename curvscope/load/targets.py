"""Whether the targets suit the loss and the model's outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvscope.errors import BatchError, LossError
from curvscope.load.class_axis import SETTLE, class_axis, sums_to_one
from curvscope.load.importing import describe
from curvscope.load.loss import named_loss
from curvscope.load.problem import Loss

# Losses whose targets are indices of classes.
CLASS_LOSSES = ("cross_entropy", "causal_lm")


def check_targets(loss: Loss, outputs: Tensor, targets: Any) -> Loss:
    """The loss, with the class axis that its outputs and targets have settled; refuses targets that do not suit it.

    The axis is in the label where the outputs have more than two axes: "cross_entropy(class_axis=last)".

    Raises:
        BatchError: dtype, shape or range of the targets, with what was expected and what was got.
        LossError: settings that do not fit the outputs, a class axis that the shapes leave open, or a callable that
            fails or returns no finite scalar.
    """
    if loss.name == "callable":
        _check_callable(loss, outputs, targets)
        return loss
    if not isinstance(targets, Tensor):
        raise BatchError(
            f"{loss.name} needs its targets as a tensor; got {type(targets).__name__}.",
            where="targets",
            remedy="Give the targets as one tensor, or a callable loss that takes what you have.",
        )
    if loss.name == "causal_lm":
        _check_causal_lm(loss, outputs, targets)
    elif loss.name == "cross_entropy":
        return _check_cross_entropy(loss, outputs, targets)
    else:
        _check_same_shape(loss, outputs, targets)
    return loss


def class_indices(targets: Any) -> Any:
    """Targets of integers as int64, in which all classes are counted; anything else as it is."""
    whole = isinstance(targets, Tensor) and targets.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32)
    return targets.long() if whole else targets


def _check_cross_entropy(loss: Loss, outputs: Tensor, targets: Tensor) -> Loss:
    if outputs.ndim < 2:
        raise LossError(
            f"cross_entropy needs outputs of shape [N, C, ...] or [N, ..., C]; the model returns "
            f"{list(outputs.shape)}.",
            where="loss cross_entropy, model output",
            remedy="Choose mse or bce_with_logits for single outputs, or return one column a class.",
        )
    if not targets.is_floating_point():
        _check_index_dtype(targets)
    axis = class_axis(loss.name, loss.settings, outputs, targets)
    classes = outputs.shape[axis]
    weight = loss.settings["weight"]
    if weight is not None and tuple(weight.shape) != (classes,):
        raise LossError(
            f"weight must have one number a class: expected shape [{classes}], got {list(weight.shape)}.",
            where="loss cross_entropy, weight",
            remedy="Give the class weights that training used.",
        )
    if targets.is_floating_point():
        _check_probabilities(loss, targets, axis)
    else:
        _check_indices(loss, targets, classes)
        _check_weights(loss, targets)
    if outputs.ndim == 2:
        return loss
    return named_loss(loss.name, {**loss.settings, "class_axis": "second" if axis == 1 else "last"})


def _check_causal_lm(loss: Loss, outputs: Tensor, targets: Tensor) -> None:
    if outputs.ndim != 3:
        raise LossError(
            f"causal_lm needs outputs of shape [N, T, V]; the model returns {list(outputs.shape)}.",
            where="loss causal_lm, model output",
            remedy="Choose cross_entropy where the targets are already those of each output.",
        )
    _check_index_dtype(targets)
    if targets.shape != outputs.shape[:2]:
        raise BatchError(
            f"causal_lm compares outputs [N, T, V] with the token ids [N, T] of the same positions (it shifts them "
            f"itself): expected shape {list(outputs.shape[:2])}, got {list(targets.shape)}.",
            where="targets",
            remedy="Give the labels unshifted, with ignore_index where none counts.",
        )
    if outputs.shape[1] < 2:
        raise BatchError(
            "causal_lm needs at least two tokens: the first one is never predicted.",
            where="targets",
            remedy="Choose a batch with longer sequences.",
        )
    # the first token is compared with nothing, so anything may stand there
    _check_indices(loss, targets[:, 1:], outputs.shape[2], offset=1)


def _check_index_dtype(targets: Tensor) -> None:
    if targets.dtype not in (torch.int64, torch.uint8):
        raise BatchError(
            f"Class indices must be int64; got {_name(targets.dtype)}.",
            where="targets",
            remedy="Convert them with targets.long().",
        )


def _check_indices(loss: Loss, targets: Tensor, classes: int, offset: int = 0) -> None:
    """Range of class indices; `offset` is how many positions of axis 1 were left out before them."""
    ignored = targets == loss.settings["ignore_index"]
    wrong = ~ignored & ((targets < 0) | (targets >= classes))
    if bool(wrong.any()):
        index = [int(i) for i in wrong.nonzero()[0]]
        value = int(targets[tuple(index)])
        if offset:
            index[1] += offset
        raise BatchError(
            f"Targets must lie between 0 and {classes - 1} ({classes} outputs); got {value} at index {index}, "
            f"{int(wrong.sum())} of {targets.numel()} in all.",
            where="targets",
            remedy=f"Number the classes from 0, or name the value to leave out: {loss.name}:ignore_index=...",
        )
    if bool(ignored.all()):
        raise BatchError(
            f"Every target is ignore_index ({loss.settings['ignore_index']}): the loss has no term.",
            where="targets",
            remedy="Choose a batch with at least one target that counts.",
        )


def _check_weights(loss: Loss, targets: Tensor) -> None:
    weight = loss.settings["weight"]
    if weight is None or loss.settings["reduction"] != "mean":
        return
    counted = targets[targets != loss.settings["ignore_index"]].long()
    if not bool(weight.to(targets.device)[counted].any()):
        raise LossError(
            "Every target that counts has class weight 0: their mean is 0 / 0.",
            where="loss cross_entropy, weight",
            remedy="Choose a batch with at least one class of positive weight, or reduction=sum.",
        )


def _check_probabilities(loss: Loss, targets: Tensor, axis: int) -> None:
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
    other = targets.ndim - 1 if axis == 1 else 1
    if other != axis and sums_to_one(targets, other) and not sums_to_one(targets, axis):
        raise LossError(
            f"The class probabilities {list(targets.shape)} sum to 1 over axis {other}, not over axis {axis}.",
            where=f"loss cross_entropy, class_axis={loss.settings['class_axis']}",
            remedy=f"Name the other axis: {SETTLE}.",
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
