"""What every root of a loss Hessian in the outputs can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from curvscope.extract.noise import Noise


@dataclass(frozen=True)
class OutputRoot:
    """S_n of `H_n = S_n S_n^T` in the forms that are needed, each shaped like the outputs.

    Attributes:
        columns: K, the columns of the example that has most; the others' are zero.
        column: k -> column k of every example.
        probe: S_n times random signs.
        draw: the gradients of the terms at a label drawn from the model, times sqrt(c); None where it is not known.
        true_gradient: dL/df -> the same at the true label.
        shared: (j, axis) -> column j of every position at once, where one position's numbers lie along `axis`; None
            where terms are not known.
        moments: variance and third central moment of |draw|^2, the trace of the Hessian of one draw; None where it is
            hardly skewed.
    """

    columns: int
    column: Callable[[int], Tensor]
    probe: Callable[[Noise], Tensor]
    draw: Callable[[Noise], Tensor] | None
    true_gradient: Callable[[Tensor], Tensor] | None
    shared: Callable[[int, int], Tensor] | None = None
    moments: Callable[[], tuple[float, float]] | None = None
