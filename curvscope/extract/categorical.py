"""The root of softmax cross-entropy, for one or many terms an example, wherever the classes lie.

A term is one softmax: an example, a token, a pixel. Its Hessian is `c (diag p - p p^T)`, c its weight in L. Terms that
do not count (c = 0: ignored tokens, padding, the last position of a causal_lm) have no columns: an example's other
terms move up, so that K is that of the example with most terms, and shorter ones end in zero columns.

Softmax runs in float64, over the terms that a column or a piece of a draw needs: nothing of the outputs' size is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from curvscope.errors import LossError
from curvscope.extract.noise import Noise, signs_of, uniform
from curvscope.extract.output_root import OutputRoot
from curvscope.graph.layout import Layout
from curvscope.load.class_axis import class_axis, next_tokens
from curvscope.load.problem import Loss

# Numbers of a draw that are worked on together.
PIECE = 2**20


def categorical_root(loss: Loss, outputs: Tensor, targets: Tensor, layout: Layout) -> OutputRoot:
    """`S = sqrt(c) (diag(sqrt p) - p sqrt(p)^T) Q`, Q the reflection that takes sqrt(p) to the likeliest class.

    That class's column is zero and dropped, C - 1 remain. Column j is
    `sqrt(c p_j) [(e_j - p) - sqrt(p_m) / (1 + sqrt(p_m)) (e_m - p)]`, m the likeliest class.

    Raises:
        LossError: no term counts, under the mean; or the examples lie along the class axis.
    """
    terms = _terms(loss, outputs, targets, layout)
    axis, classes = terms.axis, outputs.shape[terms.axis]
    logits = outputs.detach().movedim(axis, -1)

    @lru_cache(maxsize=1)
    def reflected(slot: int) -> tuple[Tensor, ...]:
        """Of every example's term in this slot: where, c, p, the likeliest class m, the others, and two scales."""
        counts = terms.weight[:, slot] > 0
        at = tuple(index[counts, slot] for index in terms.at)
        p = torch.softmax(logits[at].double(), dim=-1)
        return *at, terms.weight[counts, slot, None], p, *_reflection(p)

    def column(k: int) -> Tensor:
        slot, j = divmod(k, classes - 1)
        *at, c, p, likeliest, others, rest, at_likeliest = reflected(slot)
        values = _reflected_column(p, (likeliest, others, rest, at_likeliest), j)
        out = torch.zeros_like(outputs)
        out.movedim(axis, -1)[tuple(at)] = (values * c.sqrt()).to(out.dtype)
        return out

    def shared(j: int, along: int) -> Tensor:
        assert along == axis
        return of_every_term(lambda p, _: _reflected_column(p, _reflection(p), j))

    def of_every_term(of_piece: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """sqrt(c) times a function of p [terms, C] and which of the terms that count these are, piece by piece."""
        out = torch.zeros_like(outputs)
        into = out.movedim(axis, -1)
        where, scale = terms.counted()
        scale = scale.sqrt()
        size = max(1, PIECE // classes)
        for start in range(0, len(scale), size):
            part = slice(start, start + size)
            at = tuple(index[part] for index in where)
            p = torch.softmax(logits[at].double(), dim=-1)
            into[at] = (of_piece(p, part) * scale[part, None]).to(out.dtype)
        return out

    def words(noise: Noise) -> Tensor:
        """Random words, one a term that counts."""
        shape = (*outputs.shape[:axis], *outputs.shape[axis + 1 :])
        return noise.without(axis).words(shape, outputs.device)[terms.counted()[0]]

    def probe(noise: Noise) -> Tensor:
        drawn = words(noise)

        def of_piece(p: Tensor, part: slice) -> Tensor:
            # any root serves a random sign vector: the symmetric one needs no reflection
            s = p.sqrt() * signs_of(drawn[part], classes, p.dtype)
            return s - p * s.sum(-1, keepdim=True)

        return of_every_term(of_piece)

    def draw(noise: Noise) -> Tensor:
        drawn = words(noise)

        def of_piece(p: Tensor, part: slice) -> Tensor:
            heights = p.cumsum(-1)
            level = uniform(drawn[part]).unsqueeze(-1) * heights[:, -1:]
            labels = torch.searchsorted(heights, level, right=True).clamp(max=classes - 1)
            return p.scatter_add(-1, labels, -torch.ones_like(p[:, :1]))

        return of_every_term(of_piece)

    def true_gradient(gradient: Tensor) -> Tensor:
        out = torch.zeros_like(outputs)
        where, weight = terms.counted()
        out.movedim(axis, -1)[where] = gradient.movedim(axis, -1)[where] * weight.rsqrt().unsqueeze(-1).to(out.dtype)
        return out

    def moments() -> tuple[float, float]:
        """A term's draw has |.|^2 = c (1 - 2 p_y + sum p^2); variances and third central moments of terms add up."""
        where, c = terms.counted()
        size = max(1, PIECE // classes)
        variance = third = 0.0
        for start in range(0, len(c), size):
            p = torch.softmax(logits[tuple(index[start : start + size] for index in where)].double(), dim=-1)
            gap = c[start : start + size, None] * 2 * ((p * p).sum(-1, keepdim=True) - p)  # from the mean
            variance += float((p * gap**2).sum())
            third += float((p * gap**3).sum())
        return variance, third

    return OutputRoot(terms.weight.shape[1] * (classes - 1), column, probe, draw, true_gradient, shared, moments)


def _reflection(p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of terms p [m, C]: the likeliest class, the others [m, C - 1], and two scales of the reflected columns."""
    likeliest = p.argmax(dim=-1, keepdim=True)
    order = torch.arange(p.shape[-1] - 1, device=p.device)
    others = order + (order >= likeliest).long()
    p_m = p.gather(-1, likeliest)
    tilt = p_m.sqrt() / (1 + p_m.sqrt())
    # 1 - p_m as the sum of the other classes: the difference has no digits left when softmax saturates
    return likeliest, others, 1 - tilt, -p_m - tilt * p.gather(-1, others).sum(-1, keepdim=True)


def _reflected_column(p: Tensor, reflection: tuple[Tensor, Tensor, Tensor, Tensor], j: int) -> Tensor:
    """Column j of every term [m, C], without sqrt(c)."""
    likeliest, others, rest, at_likeliest = reflection
    own = others[:, j : j + 1]
    p_j = p.gather(-1, own)
    values = (-p * rest).scatter(-1, own, 1 - p_j * rest).scatter(-1, likeliest, at_likeliest)
    return values * p_j.sqrt()


def categorical_columns(loss: Loss, outputs: Tensor, targets: Tensor, layout: Layout) -> int:
    """K of `categorical_root`, without making it."""
    terms = _terms(loss, outputs, targets, layout)
    return terms.weight.shape[1] * (outputs.shape[terms.axis] - 1)


@dataclass(frozen=True)
class _Terms:
    """The terms that count, [N, T] with T of the example that has most: those of each example come first.

    `at` are their indices into the outputs without the class axis, `weight` their c: 0 where an example has fewer. What
    `at` holds there may be another example's.
    """

    axis: int
    at: tuple[Tensor, ...]
    weight: Tensor

    def counted(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """Indices and weights of all terms that count, in one list."""
        counts = self.weight > 0
        return tuple(index[counts] for index in self.at), self.weight[counts]


def _terms(loss: Loss, outputs: Tensor, targets: Tensor, layout: Layout) -> _Terms:
    axis = class_axis(loss.name, loss.settings, outputs, targets)
    if axis == layout.axis or (loss.name == "causal_lm" and layout.axis != 0):
        raise LossError(
            f"The examples lie along axis {layout.axis} of the outputs {list(outputs.shape)}, where {loss.name} has "
            f"its {'classes' if axis == layout.axis else 'tokens'}.",
            where=f"loss {loss.label}, model output",
            remedy="Let the model return outputs with the examples first, or settle the axis of the classes: "
            "cross_entropy:class_axis=last.",
        )
    shape = (*outputs.shape[:axis], *outputs.shape[axis + 1 :])
    of_terms = layout.on_axis(layout.axis - (axis < layout.axis))
    weight = of_terms.flat(_weights(loss, outputs, targets, axis))
    counts = weight > 0
    most = int(counts.sum(1).max())
    first = torch.argsort(counts, dim=1, descending=True, stable=True)[:, :most]
    numbers = of_terms.flat(torch.arange(math.prod(shape), device=outputs.device).view(shape)).gather(1, first)
    return _Terms(axis, tuple(torch.unravel_index(numbers, shape)), weight.gather(1, first))


def _weights(loss: Loss, outputs: Tensor, targets: Tensor, axis: int) -> Tensor:
    """C of every term, as the outputs without the class axis.

    `(1 - eps) w_y + (eps / C) sum(w)` for class y, `sum_i q_i w_i` for (smoothed) probabilities q, 0 where ignored;
    over the sum of w_y, or the number of terms under probabilities, for the mean.
    """
    settings = loss.settings
    classes = outputs.shape[axis]
    eps = float(settings.get("label_smoothing", 0.0))
    weight = settings.get("weight")
    w = torch.ones(classes, dtype=torch.float64, device=outputs.device)
    if weight is not None:
        w = torch.as_tensor(weight).to(w)
    mean = settings.get("reduction", "mean") == "mean"
    targets = targets.to(outputs.device)
    if targets.is_floating_point():
        if weight is None:
            c = targets.sum(axis, dtype=torch.float64)
        else:
            c = targets.movedim(axis, -1).double() @ w
        c = (1 - eps) * c + eps / classes * w.sum()
        return c / c.numel() if mean else c
    if loss.name == "causal_lm":
        targets = next_tokens(settings, targets)
    kept = targets != settings["ignore_index"]
    w_y = torch.where(kept, w[torch.where(kept, targets, 0).long()], 0.0)
    c = (1 - eps) * w_y + torch.where(kept, eps / classes * w.sum(), 0.0)
    if not mean:
        return c
    total = w_y.sum()
    if not bool(total > 0):
        raise LossError(
            "No term of the loss counts: every target is ignored or has class weight 0, and their mean is 0 / 0.",
            where=f"loss {loss.label}, targets",
            remedy="Choose a batch with at least one target that counts.",
        )
    return c / total
