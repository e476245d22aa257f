"""Kronecker-factored approximations of a block, with their numbers against it.

M = B (x) A acts on X [d_out, d_in] as B X A (both symmetric). EKFAC keeps the eigenbasis of the factors and takes the
block's own diagonal there (arXiv:1806.03884). kron_best is the nearest single product in Frobenius norm (Van Loan and
Pitsianis 1993).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from curvscope.curvature.block import Block


class Kronecker:
    """M = B (x) A with symmetric factors [d_out, d_out] and [d_in, d_in], float64 arithmetic."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        self.A = A.double()
        self.B = B.double()

    @cached_property
    def bases(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eigenvalues and eigenvectors (lam_A, U_A, lam_B, U_B), ascending, as the solver gave them."""
        lam_A, U_A = torch.linalg.eigh(self.A)
        lam_B, U_B = torch.linalg.eigh(self.B)
        return lam_A, U_A, lam_B, U_B

    @cached_property
    def norm(self) -> float:
        """||M||_F = ||A|| ||B||."""
        return float(torch.linalg.norm(self.A) * torch.linalg.norm(self.B))

    @cached_property
    def trace(self) -> float:
        """Tr M = tr A tr B."""
        return float(self.A.trace() * self.B.trace())

    @cached_property
    def eigenvalues(self) -> Tensor:
        """All products of the factors' eigenvalues, descending."""
        lam_A, _, lam_B, _ = self.bases
        return torch.outer(lam_B, lam_A).flatten().sort(descending=True).values

    def matvec(self, X: Tensor) -> Tensor:
        """M vec(X) as [d_out, d_in]."""
        return self.B @ X @ self.A

    def inner(self, block: Block) -> float:
        """<G, M> = sum over columns of tr(V^T B V A)."""
        return float((block.contract_inputs(self.A) * self.B).sum())

    def dense(self) -> Tensor:
        """M itself, [P, P]."""
        return torch.kron(self.B, self.A)


class EigenCorrected:
    """EKFAC: U diag(Lambda) U^T with U = U_B (x) U_A and Lambda = diag(U^T G U), [d_out, d_in]."""

    def __init__(self, kronecker: Kronecker, block: Block) -> None:
        self.kronecker = kronecker
        _, self.U_A, _, self.U_B = kronecker.bases
        self.scale = block.rotated_squares(self.U_B, self.U_A)

    @cached_property
    def norm(self) -> float:
        """||M||_F."""
        return float(torch.linalg.norm(self.scale))

    @cached_property
    def trace(self) -> float:
        """Tr M."""
        return float(self.scale.sum())

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Lambda, descending."""
        return self.scale.flatten().sort(descending=True).values

    def matvec(self, X: Tensor) -> Tensor:
        """M vec(X) as [d_out, d_in]."""
        return self.U_B @ (self.scale * (self.U_B.T @ X @ self.U_A)) @ self.U_A.T

    def dense(self) -> Tensor:
        """M itself, [P, P]."""
        U = torch.kron(self.U_B, self.U_A)
        return (U * self.scale.flatten()) @ U.T


class Diagonal:
    """M = diag(G)."""

    def __init__(self, block: Block) -> None:
        self.scale = block.diagonal

    @cached_property
    def norm(self) -> float:
        """||M||_F."""
        return float(torch.linalg.norm(self.scale))

    @cached_property
    def trace(self) -> float:
        """Tr M."""
        return float(self.scale.sum())

    @cached_property
    def eigenvalues(self) -> Tensor:
        """The diagonal, descending."""
        return self.scale.flatten().sort(descending=True).values

    def matvec(self, X: Tensor) -> Tensor:
        """M vec(X) as [d_out, d_in]."""
        return self.scale * X

    def dense(self) -> Tensor:
        """M itself, [P, P]."""
        return torch.diag(self.scale.flatten())


Approximation = Kronecker | EigenCorrected | Diagonal


@dataclass(frozen=True)
class Nearest:
    """kron_best with the facts of its iteration: value, whether it converged, and after how many steps."""

    approximation: Kronecker
    converged: bool
    steps: int


def nearest_kronecker(block: Block, start: Kronecker, *, tolerance: float = 1e-12, max_steps: int = 200) -> Nearest:
    """The B (x) A closest to G in Frobenius norm: the leading singular pair of the rearranged block.

    Power iteration on A -> sum V^T (sum V A V^T) V, from the K-FAC factor; it has converged when the singular value,
    which it increases monotonically, moves by less than `tolerance` relative. Both factors stay positive
    semidefinite along the way, so the pair is.
    """
    A = start.A if float(torch.linalg.norm(start.A)) > 0 else torch.eye(block.d_in, dtype=torch.float64)
    A = A / torch.linalg.norm(A)
    previous, converged, step = 0.0, False, 0
    B = block.contract_inputs(A)
    for step in range(1, max_steps + 1):
        size = torch.linalg.norm(B)
        if float(size) == 0.0:
            return Nearest(Kronecker(A, B), True, step)
        A = block.contract_outputs(B / size)
        sigma = torch.linalg.norm(A)
        A = A / sigma
        B = block.contract_inputs(A)
        if abs(float(sigma) - previous) <= tolerance * float(sigma):
            converged = True
            break
        previous = float(sigma)
    return Nearest(Kronecker(_symmetric(A), _symmetric(B)), converged, step)


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.T) / 2
