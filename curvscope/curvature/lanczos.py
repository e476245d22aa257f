"""Largest eigenvalues in absolute value of a symmetric operator, by Lanczos with full reorthogonalization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Extreme:
    """An eigenvalue with what it takes to trust it: its residual norm ||Mx - lambda x||, the steps, and a verdict."""

    value: float
    residual: float
    steps: int
    converged: bool


def largest_magnitude(
    matvec: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    *,
    device: torch.device,
    seed: int = 0,
    tolerance: float = 1e-6,
    max_steps: int = 200,
) -> Extreme:
    """The eigenvalue of largest absolute value of a symmetric operator on tensors of this shape, float64.

    `tolerance` bounds the residual relative to the eigenvalue; for a symmetric operator the eigenvalue's own error is
    then at most that, and of the order of its square where it is isolated. Steps end early when the Krylov space
    is exhausted, the result then being exact.
    """
    size = 1
    for extent in shape:
        size *= extent
    generator = torch.Generator(device=device).manual_seed(seed)
    vector = torch.randn(size, dtype=torch.float64, device=device, generator=generator)
    vector /= torch.linalg.norm(vector)
    basis = torch.empty(min(max_steps, size), size, dtype=torch.float64, device=device)
    alphas: list[float] = []
    betas: list[float] = []
    value, residual = 0.0, float("inf")
    steps = min(max_steps, size)
    for step in range(steps):
        basis[step] = vector
        image = matvec(vector.view(shape)).reshape(-1)
        alphas.append(float(vector @ image))
        known = basis[: step + 1]
        for _ in range(2):  # twice is enough (Parlett)
            image = image - known.T @ (known @ image)
        beta = float(torch.linalg.norm(image))
        last = step + 1 == steps
        if step % 5 == 4 or last or beta <= 1e-14 * max(map(abs, alphas)):
            value, residual = _ritz(alphas, betas, beta)
            scale = max(abs(value), 1e-300)
            if residual <= tolerance * scale or beta <= 1e-14 * scale or step + 1 == size:
                return Extreme(value, residual, step + 1, True)
        betas.append(beta)
        vector = image / beta
    return Extreme(value, residual, steps, False)


def _ritz(alphas: list[float], betas: list[float], beta: float) -> tuple[float, float]:
    """The Ritz value of largest magnitude and its residual norm."""
    T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    if betas:
        off = torch.tensor(betas, dtype=torch.float64)
        T = T + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(T)
    index = int(values.abs().argmax())
    return float(values[index]), abs(beta * float(vectors[-1, index]))
