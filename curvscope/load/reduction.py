"""How the losses of several batches make up the loss of their concatenation.

`L = sum_b share_b L_b`: the share is 1 under reduction="sum"; under "mean" it is the batch's part of what L divides by
(terms that count, with their class weights).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvscope.errors import LossError
from curvscope.load.class_axis import class_axis, next_tokens
from curvscope.load.problem import Loss

TOLERANCE = 1e-4


def denominator(loss: Loss, outputs: Tensor, targets: Any) -> float:
    """What a named loss with reduction="mean" divides its sum over this batch by.

    cross_entropy: the sum of w_y over the targets that count, or the number of terms for class probabilities;
    causal_lm: the number of next tokens that count; mse and bce_with_logits: the number of outputs.
    """
    if loss.name in ("mse", "bce_with_logits"):
        return float(outputs.numel())
    axis = class_axis(loss.name, loss.settings, outputs, targets)
    if targets.is_floating_point():
        return float(outputs.numel() // outputs.shape[axis])
    if loss.name == "causal_lm":
        targets = next_tokens(loss.settings, targets)
    kept = targets[targets != loss.settings["ignore_index"]].long()
    weight = loss.settings.get("weight")
    return float(kept.numel() if weight is None else weight.double().to(kept.device)[kept].sum())


def has_terms(loss: Loss, targets: Any) -> bool:
    """Whether any target of the batch counts; False only for class indices that are all ignored or weigh nothing."""
    if loss.name not in ("cross_entropy", "causal_lm") or not isinstance(targets, Tensor):
        return True
    if targets.is_floating_point():
        return True
    if loss.name == "causal_lm":
        targets = targets[:, 1:] if targets.ndim == 2 else targets
    kept = targets[targets != loss.settings["ignore_index"]]
    weight = loss.settings.get("weight")
    if weight is None or kept.numel() == 0 or bool((kept < 0).any()) or int(kept.max()) >= len(weight):
        return kept.numel() > 0
    return loss.settings["reduction"] != "mean" or bool(weight.to(kept.device)[kept.long()].any())


def averages(loss: Loss, parts: list[tuple[Tensor, Any, int]], joined: tuple[Tensor, Any]) -> bool:
    """Whether a callable loss averages over examples (True) or adds them up (False), told from two parts of a batch.

    Args:
        loss: the callable loss.
        parts: outputs, targets and number of examples of each part.
        joined: outputs and targets of both together.

    Raises:
        LossError: it does neither, or both readings hold.
    """
    with torch.no_grad():
        values = [float(loss(outputs, targets)) for outputs, targets, _ in parts]
        whole = float(loss(*joined))
    counts = [count for _, _, count in parts]
    mean = sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)
    size = max(abs(whole), *(abs(value) for value in values))
    of_mean, of_sum = (abs(whole - guess) <= TOLERANCE * size for guess in (mean, sum(values)))
    if of_mean != of_sum:
        return of_mean
    raise LossError(
        "It can't be told how the loss of several batches is made up of theirs: over two parts of the data it is "
        f"{values[0]:.6g} ({counts[0]} examples) and {values[1]:.6g} ({counts[1]} examples), over both {whole:.6g}, "
        "which is neither their sum nor their mean over examples.",
        where=f"loss {loss.label}",
        remedy="Use one of the named losses, a callable that adds or averages one term an example, or one batch that "
        "fits --memory in one piece.",
    )
