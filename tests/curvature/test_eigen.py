"""Eigenvalues where LAPACK's first route may fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from curvscope.curvature import eigen
from curvscope.errors import AnalysisError


def mostly_zero() -> torch.Tensor:
    """A factor most of whose inputs never differ from zero."""
    torch.manual_seed(0)
    rows = torch.zeros(12, 40, dtype=torch.float64)
    rows[:, :6] = torch.randn(12, 6, dtype=torch.float64)
    return rows.T @ rows


@pytest.mark.parametrize("failures", [0, 1, 2, 3])
def test_other_routes_give_the_same(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    matrix = mostly_zero()
    values, vectors = torch.linalg.eigh(matrix)
    calls = []
    real = torch.linalg.eigh

    def failing(given: torch.Tensor, **options: Any) -> Any:
        calls.append(options)
        if len(calls) <= failures:
            raise torch.linalg.LinAlgError("failed to converge")
        return real(given, **options)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    got, basis = eigen.eigh(matrix)
    assert len(calls) == failures + 1
    torch.testing.assert_close(got, values, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((basis * got) @ basis.T, (vectors * values) @ vectors.T)


def test_when_nothing_converges_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr(torch.linalg, "eigvalsh", failing)
    with pytest.raises(AnalysisError, match="did not converge"):
        eigen.eigvalsh(mostly_zero())
