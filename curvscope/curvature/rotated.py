"""Any approximation of a block in the basis in which it is diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.curvature.kronecker import Approximation, Diagonal, Kronecker


@dataclass(frozen=True)
class Rotated:
    """M = U diag(scale) U^T with U = U_B (x) U_A; both None for M that is diagonal as it stands.

    Attributes:
        scale: M's eigenvalues, [d_out, d_in]. Those of a factor that are negative within its rounding stand as zero.
        U_B, U_A: eigenvectors of the factors.
        lam_B, lam_A: eigenvalues of the factors of a Kronecker product, None for anything else.
        noise: eigenvalues of M below this are rounding of the dtype that its factors were summed in.
    """

    scale: Float64[Tensor, "d_out d_in"]
    U_B: Float64[Tensor, "d_out d_out"] | None = None
    U_A: Float64[Tensor, "d_in d_in"] | None = None
    lam_B: Float64[Tensor, " d_out"] | None = None
    lam_A: Float64[Tensor, " d_in"] | None = None
    noise: float = 0.0

    def turned(self, X: Float64[Tensor, "*m d_out d_in"]) -> Float64[Tensor, "*m d_out d_in"]:
        """U^T vec(X)."""
        X = X if self.U_B is None else self.U_B.T @ X
        return X if self.U_A is None else X @ self.U_A


def rotated(approximation: Approximation, dtype: torch.dtype) -> Rotated:
    """The approximation in its eigenbasis; `dtype` is the one its factors were summed in."""
    eps = torch.finfo(dtype).eps
    if isinstance(approximation, Diagonal):
        return Rotated(approximation.scale)
    if isinstance(approximation, Kronecker):
        lam_A, U_A, lam_B, U_B = approximation.bases
        lam_A, lam_B = _without_noise(lam_A, eps), _without_noise(lam_B, eps)
        scale = torch.outer(lam_B, lam_A)
        return Rotated(scale, U_B, U_A, lam_B, lam_A, eps * float(scale.max()))
    scale = approximation.scale
    scale = torch.where((scale < 0) & (scale >= -scale.numel() * eps * scale.max()), 0.0, scale)
    return Rotated(scale, approximation.U_B, approximation.U_A)


def _without_noise(values: Tensor, eps: float) -> Tensor:
    """A semidefinite factor has no negative eigenvalue: within n eps of the largest they are zero."""
    return torch.where((values < 0) & (values >= -values.numel() * eps * values.max()), 0.0, values)
