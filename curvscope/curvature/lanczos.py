"""Largest eigenvalues in absolute value of a symmetric operator, by Lanczos with full reorthogonalization."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BASIS_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Extreme:
    """An eigenpair with what it takes to trust it: its residual norm ||Mx - lambda x||, the steps, and a verdict."""

    value: float
    vector: Tensor
    residual: float
    steps: int
    converged: bool


def largest_magnitude(
    matvec: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    *,
    device: torch.device,
    start: Tensor | None = None,
    seed: int = 0,
    tolerance: float = 1e-6,
    max_steps: int = 200,
    basis_bytes: int = BASIS_BYTES,
) -> Extreme:
    """The eigenpair of largest absolute value of a symmetric operator on tensors of this shape, float64.

    `tolerance` bounds the residual relative to the eigenvalue; for a symmetric operator the eigenvalue's own error is
    then at most that, and of the order of its square where it is isolated. Without `start` the first vector is
    random. Steps end early when the Krylov space is exhausted, the result then being exact, and at the latest when
    the basis fills `basis_bytes` (but not before 20).
    """
    size = math.prod(shape)
    steps = min(size, max_steps, max(20, basis_bytes // (8 * size)))
    if start is None:
        generator = torch.Generator(device=device).manual_seed(seed)
        vector = torch.randn(size, dtype=torch.float64, device=device, generator=generator)
    else:
        vector = start.double().reshape(-1)
    vector = vector / torch.linalg.norm(vector)
    basis = torch.empty(steps, size, dtype=torch.float64, device=device)
    alphas: list[float] = []
    betas: list[float] = []
    for step in range(steps):
        basis[step] = vector
        image = matvec(vector.view(shape)).reshape(-1)
        alphas.append(float(vector @ image))
        known = basis[: step + 1]
        for _ in range(2):  # twice is enough (Parlett)
            image = image - (image @ known.T) @ known
        beta = float(torch.linalg.norm(image))
        value, weights, residual = _ritz(alphas, betas, beta)
        scale = max(abs(value), 1e-300)
        exhausted = beta <= 1e-14 * scale or step + 1 == size
        if residual <= tolerance * scale or exhausted or step + 1 == steps:
            ritz = (weights.to(device) @ known).view(shape)
            return Extreme(value, ritz, residual, step + 1, exhausted or residual <= tolerance * scale)
        betas.append(beta)
        vector = image / beta
    raise AssertionError("unreachable: the last step returns")


def _ritz(alphas: list[float], betas: list[float], beta: float) -> tuple[float, Tensor, float]:
    """The Ritz value of largest magnitude, its vector in the basis, and its residual norm."""
    T = torch.diag(torch.tensor(alphas, dtype=torch.float64))
    if betas:
        off = torch.tensor(betas, dtype=torch.float64)
        T = T + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(T)
    index = int(values.abs().argmax())
    return float(values[index]), vectors[:, index], abs(beta * float(vectors[-1, index]))
