"""Signs that inputs and outputs show by themselves, gathered piece by piece: odd examples, and outputs too sure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curvscope.load.class_axis import class_axis, next_tokens
from curvscope.load.problem import Loss
from curvscope.measure.signs import missing, sign_row
from curvscope.records import StabilityRow

# float32's 1 - p at the logit gap of `logit_gap`: an output this sure is certain.
CERTAIN = 0.999
# Terms of which the gap between the two largest logits is kept for the median.
MOST_GAPS = 2**22
OF_OUTPUTS = ("logit_gap", "wrong_and_certain")


class InputSizes:
    """`odd_example`: the largest RMS of one example's inputs over the median example's."""

    def __init__(self, axes: Sequence[int | None]) -> None:
        self.axes = axes
        self.sizes: dict[int, list[Tensor]] = {}

    def add(self, tensors: Sequence[Tensor]) -> None:
        """The inputs of further examples."""
        for place, (tensor, axis) in enumerate(zip(tensors, self.axes, strict=True)):
            if axis is not None and tensor.is_floating_point() and tensor.ndim >= 2:
                each = tensor.double().movedim(axis, 0).flatten(1).square().mean(1).sqrt()
                self.sizes.setdefault(place, []).append(each)

    def row(self) -> StabilityRow:
        """The worst over all inputs."""
        worst, reason = float("nan"), "no input is a floating-point tensor with an example axis"
        for parts in self.sizes.values():
            sizes = torch.cat(parts)
            middle = float(sizes.median())
            if len(sizes) < 3 or not middle > 0 or not math.isfinite(middle):
                continue
            place = int(sizes.argmax())
            ratio = float(sizes[place]) / middle
            if math.isnan(worst) or ratio > worst:
                worst, reason = ratio, f"example {place}"
        return missing("odd_example", reason) if math.isnan(worst) else sign_row("odd_example", worst, reason=reason)


class OutputSigns:
    """Of softmax losses with class targets, over the terms that count.

    `logit_gap`, the median of the largest logit less the second; `wrong_and_certain`, the share of terms with p > 0.999
    on another class than the target. `layer` is the one that makes the outputs, where there is one.
    """

    def __init__(self, loss: Loss, layer: str = "") -> None:
        self.loss = loss
        self.layer = layer
        self.gaps: list[Tensor] = []
        self.terms = self.kept = self.sure = 0
        self.largest_logit = self.largest_term = -math.inf
        self.why_not = ""

    def add(self, outputs: Tensor, targets: object) -> None:
        """The outputs of further examples."""
        loss = self.loss
        if loss.name not in ("cross_entropy", "causal_lm") or self.why_not:
            return
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            self.why_not = "the targets are probabilities, not classes"
            return
        axis = class_axis(loss.name, loss.settings, outputs, targets)
        if loss.name == "causal_lm":
            targets = next_tokens(loss.settings, targets)
        logits = outputs.detach().double().movedim(axis, -1).flatten(0, -2)
        wanted = targets.to(outputs.device).flatten()
        if logits.shape[0] != wanted.shape[0] or logits.shape[-1] < 2:
            self.why_not = "the targets do not lie as the outputs do"
            return
        counts = wanted != loss.settings.get("ignore_index", -100)
        if not bool(counts.any()):
            return
        logits, wanted = logits[counts], wanted[counts]
        two = logits.topk(2, dim=-1).values
        if self.kept < MOST_GAPS:
            gaps = (two[:, 0] - two[:, 1])[: MOST_GAPS - self.kept]
            self.gaps.append(gaps)
            self.kept += len(gaps)
        p, likeliest = torch.softmax(logits, -1).max(-1)
        self.terms += len(wanted)
        self.sure += int(((p > CERTAIN) & (likeliest != wanted)).sum())
        self.largest_logit = max(self.largest_logit, float(logits.abs().max()))
        least = torch.log_softmax(logits, -1).gather(-1, wanted[:, None]).min()
        self.largest_term = max(self.largest_term, -float(least))

    def rows(self) -> list[StabilityRow]:
        """The rows of everything that was added."""
        if self.loss.name not in ("cross_entropy", "causal_lm"):
            return []
        if self.why_not or not self.terms:
            reason = self.why_not or "the targets do not lie as the outputs do"
            return [missing(name, reason) for name in OF_OUTPUTS]
        gap = float(torch.cat(self.gaps).median())
        words = f"largest |logit| {self.largest_logit:.3g}"
        if self.kept < self.terms:
            words += f"; the median of the first {self.kept} of {self.terms} terms"
        return [
            sign_row("logit_gap", gap, layer=self.layer, reason=words),
            sign_row(
                "wrong_and_certain",
                self.sure / self.terms,
                layer=self.layer,
                reason=f"largest term of the loss {self.largest_term:.3g}",
            ),
        ]
