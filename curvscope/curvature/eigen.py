"""Eigenvalues of symmetric matrices, with another route where LAPACK's first one does not converge."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from curvscope.errors import AnalysisError

NoConvergence: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def eigh(matrix: Float64[Tensor, "*batch n n"]) -> tuple[Float64[Tensor, "*batch n"], Float64[Tensor, "*batch n n"]]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix, as the solver gave them.

    The divide-and-conquer solver can fail on sound matrices (many zero rows beside large entries); the other triangle,
    and then a copy scaled to 1, take it through other roundings.

    Raises:
        AnalysisError: the matrix is not finite, or no route converges.
    """
    size = matrix.abs().max() if matrix.numel() else matrix.new_zeros(())
    if not bool(torch.isfinite(size)):
        raise AnalysisError(
            "A factor or block is not finite: products of activations or of gradients overflow.",
            where=f"matrix {list(matrix.shape)}",
            remedy="Look for layers with very large inputs or weights, or analyze with --dtype float64.",
        )
    scale = size if float(size) > 0 else matrix.new_ones(())
    routes = ((matrix, "L", 1.0), (matrix, "U", 1.0), (matrix / scale, "L", scale), (matrix / scale, "U", scale))
    for given, triangle, factor in routes:
        try:
            values, vectors = torch.linalg.eigh(given, UPLO=triangle)
        except NoConvergence:
            continue
        return values * factor, vectors
    raise AnalysisError(
        "The eigendecomposition of a factor or block did not converge.",
        where=f"matrix {list(matrix.shape)}, largest entry {float(size):.3g}",
        remedy="Try --dtype float64; if it persists, please report it with the file made by --dump blocks.",
    )


def eigvalsh(matrix: Float64[Tensor, "*batch n n"]) -> Float64[Tensor, "*batch n"]:
    """The eigenvalues alone, ascending."""
    try:
        return torch.linalg.eigvalsh(matrix)
    except NoConvergence:
        return eigh(matrix)[0]
