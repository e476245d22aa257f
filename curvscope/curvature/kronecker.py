"""Kronecker-factored approximations of a block, with their numbers against it.

M = B (x) A acts on X [d_out, d_in] as B X A (both symmetric). EKFAC keeps the eigenbasis of the factors and takes the
block's own diagonal there (arXiv:1806.03884). kron_best is the nearest single product in Frobenius norm (Van Loan and
Pitsianis 1993).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from curvscope.curvature.block import Block
from curvscope.curvature.eigen import eigh
from curvscope.curvature.lanczos import largest_magnitude
from curvscope.curvature.tiles import Watch
from curvscope.extract.plan import PIECES_AT_ONCE


class Kronecker:
    """M = B (x) A with symmetric factors [d_out, d_out] and [d_in, d_in], float64 arithmetic."""

    def __init__(self, A: Float[Tensor, "d_in d_in"], B: Float[Tensor, "d_out d_out"]) -> None:
        self.A = A.double()
        self.B = B.double()

    @cached_property
    def bases(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Eigenvalues and eigenvectors (lam_A, U_A, lam_B, U_B), ascending, as the solver gave them.

        A diagonal factor (an embedding's A) has the unit vectors for eigenvectors, whichever of its values are equal.
        """
        lam_A, U_A = _eigenbasis(self.A)
        lam_B, U_B = _eigenbasis(self.B)
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
    def eigenvalues(self) -> Float64[Tensor, " P"]:
        """All products of the factors' eigenvalues, descending."""
        lam_A, _, lam_B, _ = self.bases
        return torch.outer(lam_B, lam_A).flatten().sort(descending=True).values

    def matvec(self, X: Float64[Tensor, "d_out d_in"]) -> Float64[Tensor, "d_out d_in"]:
        """M vec(X) as [d_out, d_in]."""
        return self.B @ X @ self.A

    def inner(self, block: Block) -> float:
        """<G, M> = sum over columns of tr(V^T B V A)."""
        return float((block.contract_inputs(self.A) * self.B).sum())

    def dense(self) -> Float64[Tensor, "P P"]:
        """M itself, [P, P]."""
        return torch.kron(self.B, self.A)


class EigenCorrected:
    """EKFAC: U diag(Lambda) U^T with U = U_B (x) U_A and Lambda = diag(U^T G U), [d_out, d_in]."""

    def __init__(self, kronecker: Kronecker, block: Block, *, fast: bool = False, watch: Watch | None = None) -> None:
        self.kronecker = kronecker
        self.lam_A, self.U_A, self.lam_B, self.U_B = kronecker.bases
        self.scale = block.rotated_squares(self.U_B, self.U_A, fast=fast, watch=watch)

    @cached_property
    def inner(self) -> float:
        """<G, B (x) A> of the Kronecker product whose basis this is: sum Lambda * outer(lam_B, lam_A)."""
        return float((self.scale * torch.outer(self.lam_B, self.lam_A)).sum())

    @cached_property
    def norm(self) -> float:
        """||M||_F."""
        return float(torch.linalg.norm(self.scale))

    @cached_property
    def trace(self) -> float:
        """Tr M."""
        return float(self.scale.sum())

    @cached_property
    def eigenvalues(self) -> Float64[Tensor, " P"]:
        """Lambda, descending."""
        return self.scale.flatten().sort(descending=True).values

    def matvec(self, X: Float64[Tensor, "d_out d_in"]) -> Float64[Tensor, "d_out d_in"]:
        """M vec(X) as [d_out, d_in]."""
        return self.U_B @ (self.scale * (self.U_B.T @ X @ self.U_A)) @ self.U_A.T

    def dense(self) -> Float64[Tensor, "P P"]:
        """M itself, [P, P]."""
        # torch.kron refuses factors of different memory layouts
        U = torch.kron(self.U_B.contiguous(), self.U_A.contiguous())
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
    def eigenvalues(self) -> Float64[Tensor, " P"]:
        """The diagonal, descending."""
        return self.scale.flatten().sort(descending=True).values

    def matvec(self, X: Float64[Tensor, "d_out d_in"]) -> Float64[Tensor, "d_out d_in"]:
        """M vec(X) as [d_out, d_in]."""
        return self.scale * X

    def dense(self) -> Float64[Tensor, "P P"]:
        """M itself, [P, P]."""
        return torch.diag(self.scale.flatten())


Approximation = Kronecker | EigenCorrected | Diagonal


@dataclass(frozen=True)
class Nearest:
    """kron_best with the facts of its iteration: value, whether it converged, and after how many steps."""

    approximation: Kronecker
    converged: bool
    steps: int


def nearest_kronecker(block: Block, start: Kronecker, *, seed: int = 0) -> Nearest:
    """The B (x) A closest to G in Frobenius norm: the leading singular pair of the rearranged block.

    Lanczos on `A -> sum V^T (sum V A V^T) V`, from the K-FAC factor, in the columns' own dtype. An error e in A changes
    the distance to G by e^2 only, so a residual of 1e-5 (1e-8 in float64) leaves no trace in it. By Perron-Frobenius
    for maps that keep positive semidefinite matrices such, the pair is positive semidefinite up to that residual.
    """
    first = start.A if float(torch.linalg.norm(start.A)) > 0 else torch.eye(block.d_in, dtype=torch.float64)
    found = largest_magnitude(
        lambda X: block.contract_outputs(block.contract_inputs(X, fast=True), fast=True),
        (block.d_in, block.d_in),
        device=start.A.device,
        start=first,
        seed=seed,
        tolerance=1e-8 if block.dtype == torch.float64 else 1e-5,
        max_steps=50,
        basis_bytes=PIECES_AT_ONCE * block.piece_bytes,
    )
    A = _symmetric(found.vector)
    A = A if float(A.trace()) >= 0 else -A
    return Nearest(Kronecker(A, _symmetric(block.contract_inputs(A))), found.converged, found.steps)


def _eigenbasis(X: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and eigenvectors; unit vectors where X is diagonal."""
    diagonal = X.diagonal()
    if torch.count_nonzero(X) > torch.count_nonzero(diagonal):
        return eigh(X)
    values, order = diagonal.sort()
    return values, torch.eye(X.shape[0], dtype=X.dtype, device=X.device)[:, order]


def _symmetric(X: Tensor) -> Tensor:
    return (X + X.T) / 2
