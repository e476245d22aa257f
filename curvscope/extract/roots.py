"""Roots of the loss Hessian: what the backward passes start from.

`H_n = d^2 L / d f_n^2 = S_n S_n^T` for the outputs `f_n` of one example, in the scale of L as trained. A column k is
backpropagated for all examples in one pass: its cotangent holds `S_n[:, k]` for every n.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvscope.errors import LossError, UsageError, out_of_memory
from curvscope.extract.categorical import categorical_columns, categorical_root
from curvscope.extract.noise import Noise
from curvscope.extract.output_root import OutputRoot
from curvscope.graph.layout import Layout
from curvscope.graph.verify import Independent
from curvscope.load.problem import Loss

CALLABLE_LIMIT = 2048


@dataclass(frozen=True)
class Root:
    """A root of the loss Hessian in its outputs.

    Attributes:
        fisher: exact, probe, mc or empirical.
        columns: K, the columns of one example (draws, for probe and mc).
        column: k -> cotangent shaped like the outputs; the draws' 1/sqrt(K) is in it.
        gradient: dL/df, shaped like the outputs.
        loss: L itself.
        outputs: how many outputs one example has.
        unit: what the columns are multiplied with, a power of two; everything quadratic in them carries its square.
        shared: every position has columns of its own, and one cotangent holds those of all positions.
        draw_moments: variance and third central moment of the trace of one mc draw's Hessian in the outputs, in the
            loss's own unit; zeros for the others.
    """

    fisher: str
    columns: int
    column: Callable[[int], Tensor]
    gradient: Tensor
    loss: float
    outputs: int
    unit: float = 1.0
    shared: bool = False
    draw_moments: tuple[float, float] = (0.0, 0.0)


def make_root(
    loss: Loss,
    outputs: Tensor,
    targets: Any,
    layout: Layout,
    *,
    fisher: str,
    samples: int,
    seed: int,
    start: int = 0,
    independent: Independent | None = None,
) -> Root:
    """The root of L's Hessian in the outputs, for `fisher` exact, probe, mc or empirical.

    Exact columns of `independent` positions come together, those of one position after the other: then K counts the
    columns of a position.

    `outputs` are the model's, detached; `layout` says where their examples are. Arithmetic is float64; columns come
    back in the outputs' dtype. Draws depend on `seed` and on the number of every example, the first being `start`
    (see `curvscope.extract.noise`): pieces of the data are given what all of it would be.

    Raises:
        LossError: a callable loss that is no sum over examples, not convex, or too large for its Hessian.
        UsageError: `mc` or `empirical` for a callable loss, whose per-example terms are not known.
    """
    makers = {"cross_entropy": categorical_root, "causal_lm": categorical_root, "mse": _mse, "bce_with_logits": _bce}
    maker = makers.get(loss.name)
    # a named loss without any term is refused in words before its value is found to be NaN
    root = maker(loss, outputs, targets, layout) if maker else None
    value, gradient = _loss_and_gradient(loss, outputs, targets)
    root = root or _callable(loss, outputs, targets, layout, seed)
    dtype = outputs.dtype
    count = outputs_an_example(outputs, layout)
    if root.columns == 0:
        raise LossError(
            "The loss has no curvature in the outputs: its second derivative is zero for every example.",
            where=f"loss {loss.label}, outputs {list(outputs.shape)}",
            remedy="A loss that is linear in the outputs (or cross-entropy over one class) has G = 0; there is nothing "
            "to approximate.",
        )
    shared = root.shared if fisher == "exact" and independent is not None else None
    if shared is not None and independent is not None:
        axis = independent.axis
        columns, column = independent.columns, lambda k: shared(k, axis)
    elif fisher == "exact":
        columns, column = root.columns, root.column
    elif fisher == "empirical":
        if root.true_gradient is None:
            raise _no_terms(fisher)
        single = root.true_gradient(gradient)
        columns, column = 1, lambda k: single
    else:
        source = root.probe if fisher == "probe" else root.draw
        if source is None:
            raise _no_terms(fisher)
        draw, seeds = source, _seeds(seed, samples)

        def column(k: int) -> Tensor:
            # drawn anew at every call: a sweep holds one draw, however many there are
            return draw(Noise(seeds[k], layout, start)) / samples**0.5

        columns = samples
    unit = _unit(root.probe(Noise(seed, layout, start)))
    scaled = lambda k: (column(k) * unit).to(dtype)  # noqa: E731
    moments = root.moments() if fisher == "mc" and root.moments is not None else (0.0, 0.0)
    return Root(fisher, columns, scaled, gradient, value, count, unit, shared is not None, moments)


def _unit(columns: Tensor) -> float:
    """A power of two that brings columns near 1 where their squares would leave float32's range; 1 elsewhere.

    A saturated softmax makes columns of 1e-20 and less: their products would vanish in float32, and a curvature that is
    tiny would be taken for none.
    """
    size = float(columns.abs().max())
    return 1.0 if size == 0.0 or 2.0**-20 <= size <= 2.0**20 else 2.0 ** -round(math.log2(size))


def exact_columns(loss: Loss, outputs: Tensor, layout: Layout, targets: Any = None) -> int:
    """K of the exact root: (C - 1) a term of cross-entropy that counts, one an output otherwise.

    Without targets it is not known which terms of a cross-entropy count, nor always where its classes are: then what
    comes back is the most that K can be.
    """
    count = outputs_an_example(outputs, layout)
    if loss.name not in ("cross_entropy", "causal_lm"):
        return count
    if targets is not None:
        return categorical_columns(loss, outputs, targets, layout)
    second = loss.name == "cross_entropy" and loss.settings["class_axis"] != "last"
    last = loss.name == "causal_lm" or loss.settings["class_axis"] != "second"
    axes = [1] * second + [-1] * last
    return max(count - count // outputs.shape[axis] for axis in axes)


def outputs_an_example(outputs: Tensor, layout: Layout) -> int:
    """How many outputs one example has."""
    return layout.width(outputs)


def _seeds(seed: int, count: int) -> list[int]:
    """A seed for every draw, so that each can be made alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**62, (count,), generator=generator).tolist()


def _no_terms(fisher: str) -> UsageError:
    return UsageError(
        f"--fisher {fisher} needs to know the loss of each example, and a callable loss gives only their sum.",
        where="loss",
        remedy="Use --fisher exact or --fisher probe, or one of the named losses.",
    )


def _loss_and_gradient(loss: Loss, outputs: Tensor, targets: Any) -> tuple[float, Tensor]:
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        value = loss(leaf, targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LossError(
                f"The loss is not a scalar: expected one number, got {got}.",
                where=f"loss {loss.label}",
                remedy="Sum or average it over the batch, as it is trained.",
            )
        if not bool(torch.isfinite(value)):
            raise LossError(
                f"The loss is {float(value.detach())}.",
                where=f"loss {loss.label} on this batch",
                remedy="Look at the outputs and targets: a finite loss is needed to speak of curvature.",
            )
        if not value.requires_grad:
            raise LossError(
                "The loss does not depend on the outputs.",
                where=f"loss {loss.label}",
                remedy="It must be computed from the model's outputs by differentiable operations.",
            )
        (gradient,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), gradient.detach()


def _mse(loss: Loss, outputs: Tensor, targets: Tensor, layout: Layout) -> OutputRoot:
    """`S = sqrt(2 c) I`, c = 1 / (number of outputs) for the mean, 1 for the sum."""
    c = 1.0 / outputs.numel() if loss.settings.get("reduction", "mean") == "mean" else 1.0
    scale = torch.full(outputs.shape, (2 * c) ** 0.5, dtype=torch.float64, device=outputs.device)

    def draw(noise: Noise) -> Tensor:
        return scale * noise.normal(scale)

    return _elementwise(scale, outputs.dtype, layout, draw, lambda gradient: gradient.double() / c**0.5)


def _bce(loss: Loss, outputs: Tensor, targets: Tensor, layout: Layout) -> OutputRoot:
    """`S = diag(sqrt(c w p (1 - p)))`, w = weight * (pos_weight y + 1 - y)."""
    settings = loss.settings
    c = 1.0 / outputs.numel() if settings.get("reduction", "mean") == "mean" else 1.0
    y = targets.to(device=outputs.device, dtype=torch.float64)
    positive = torch.as_tensor(settings["pos_weight"]).to(y) if settings.get("pos_weight") is not None else 1.0
    w = positive * y + (1 - y)
    if settings.get("weight") is not None:
        w = w * torch.as_tensor(settings["weight"]).to(y)
    z = outputs.detach().double()
    p, q = torch.sigmoid(z), torch.sigmoid(-z)
    coefficient = (c * w).expand_as(z)

    def draw(noise: Noise) -> Tensor:
        label = (noise.uniform(p) < p).double()
        return coefficient.sqrt() * (p - label)

    def true_gradient(gradient: Tensor) -> Tensor:
        return gradient.double() / torch.where(coefficient > 0, coefficient, torch.ones_like(coefficient)).sqrt()

    def moments() -> tuple[float, float]:
        """Of c w (p - label)^2, which takes two values that differ by c w (q - p)."""
        gap = coefficient * (q - p)
        return float((gap**2 * p * q).sum()), float((gap**3 * p * q * (q - p)).sum())

    made = _elementwise((coefficient * p * q).sqrt(), outputs.dtype, layout, draw, true_gradient)
    return dataclasses.replace(made, moments=moments)


def _elementwise(
    scale: Tensor,
    dtype: torch.dtype,
    layout: Layout,
    draw: Callable[[Noise], Tensor],
    true_gradient: Callable[[Tensor], Tensor],
) -> OutputRoot:
    """The root of a diagonal Hessian: one column an output of the example."""
    flat = layout.flat(scale)

    def column(k: int) -> Tensor:
        out = torch.zeros_like(flat, dtype=dtype)
        out[:, k] = flat[:, k].to(dtype)
        return layout.unflat(out, scale)

    def probe(noise: Noise) -> Tensor:
        return scale * noise.signs(scale)

    def shared(j: int, along: int) -> Tensor:
        out = torch.zeros_like(scale, dtype=dtype)
        out.select(along, j).copy_(scale.select(along, j))
        return out

    return OutputRoot(flat.shape[1], column, probe, draw, true_gradient, shared)


def _callable(loss: Loss, outputs: Tensor, targets: Any, layout: Layout, seed: int) -> OutputRoot:
    """`S_n = U sqrt(Lambda)` from the eigenvectors of each H_n, after checking that L may be treated so.

    The D products with a unit output of all examples at once give every H_n, provided that the Hessian blocks
    between examples vanish; the same products with random signs an example tell whether they do.
    """
    count = layout.flat(outputs).shape[1]
    if count > CALLABLE_LIMIT:
        raise LossError(
            f"The Hessian of a callable loss is formed for each example, and {count} outputs an example are too "
            f"many (at most {CALLABLE_LIMIT}).",
            where=f"loss {loss.label}",
            remedy="Use one of the named losses (cross_entropy, mse, bce_with_logits) where that is what it computes.",
        )
    product = _hessian_product(loss, outputs, targets)
    examples = layout.flat(outputs).shape[0]
    hessian = torch.zeros(examples, count, count, dtype=torch.float64, device=outputs.device)
    like = outputs.detach().double()
    for d in range(count):
        unit = torch.zeros(examples, count, dtype=torch.float64, device=outputs.device)
        unit[:, d] = 1.0
        hessian[:, :, d] = layout.flat(product(layout.unflat(unit, like)))
    size = float(hessian.abs().max())
    if not torch.isfinite(hessian).all():
        raise LossError(
            "The loss has no finite second derivative at these outputs.",
            where=f"loss {loss.label}",
            remedy="Use a loss that is twice differentiable where the model is.",
        )
    tolerance = _loss_eps(loss, outputs, targets) * max(size, 1e-300) * 100
    for number in range(2):
        vector = layout.flat(Noise(seed + number, layout).signs(like))
        expected = torch.einsum("nde,ne->nd", hessian, vector)
        got = layout.flat(product(layout.unflat(vector, like)))
        gap = float((got - expected).abs().max())
        if gap > tolerance * count * max(1, examples) ** 0.5:
            raise LossError(
                f"The loss is not a sum over examples: its Hessian couples different examples (by {gap:.2g}, where "
                f"the largest entry within an example is {size:.2g}).",
                where=f"loss {loss.label}",
                remedy="Write it as a sum or mean of one term an example; K-FAC and the GGN are defined for that.",
            )
    hessian = (hessian + hessian.transpose(1, 2)) / 2
    values, vectors = torch.linalg.eigh(hessian)
    lowest, highest = float(values.min()), float(values.max())
    if lowest < -tolerance * count:
        raise LossError(
            f"The loss is not convex in the outputs: its Hessian has an eigenvalue {lowest:.3g} "
            f"(largest {highest:.3g}).",
            where=f"loss {loss.label}",
            remedy="The GGN needs a loss that is convex in the model's outputs; compute it from logits, not from "
            "probabilities, for example.",
        )
    # Beyond rounding nothing is cut: an eigenvalue below zero here is what rounding left of a zero.
    root = vectors * values.clamp(min=0.0).sqrt().unsqueeze(1)
    rank = int((values > tolerance).sum(1).max())
    root, vectors = root[:, :, count - rank :], vectors[:, :, count - rank :]

    def column(k: int) -> Tensor:
        return layout.unflat(root[:, :, k], like)

    def probe(noise: Noise) -> Tensor:
        # through the symmetric root: eigenvectors of equal eigenvalues are whatever the solver made them
        drawn = torch.einsum("nek,ne->nk", vectors, layout.flat(noise.signs(like)))
        return layout.unflat(torch.einsum("ndk,nk->nd", root, drawn), like)

    return OutputRoot(rank, column, probe, None, None)


def _loss_eps(loss: Loss, outputs: Tensor, targets: Any) -> float:
    return float(torch.finfo(_working_dtype(loss, outputs, targets)).eps)


def _working_dtype(loss: Loss, outputs: Tensor, targets: Any) -> torch.dtype:
    """float64 where the loss runs in it, else the outputs' own dtype."""
    try:
        value = loss(outputs.detach().double(), _double(targets))
    except (RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):
            raise
        return outputs.dtype
    return value.dtype if isinstance(value, Tensor) and value.is_floating_point() else outputs.dtype


def _double(targets: Any) -> Any:
    return targets.double() if isinstance(targets, Tensor) and targets.is_floating_point() else targets


def _hessian_product(loss: Loss, outputs: Tensor, targets: Any) -> Callable[[Tensor], Tensor]:
    """V -> (d^2 L / d f^2) v for all outputs together, float64 in and out."""
    dtype = _working_dtype(loss, outputs, targets)
    aims = _double(targets) if dtype == torch.float64 else targets
    with torch.enable_grad():
        leaf = outputs.detach().to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, aims), leaf, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        if not gradient.requires_grad:
            return torch.zeros_like(vector)  # a loss linear in the outputs
        (result,) = torch.autograd.grad(
            gradient, leaf, grad_outputs=vector.to(dtype), retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(vector) if result is None else result.detach().double()

    return product
