from __future__ import annotations

import pytest
import torch
from torch import Tensor

from curvscope.curvature.extremes import extremes
from curvscope.errors import AnalysisError


def symmetric(values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    return (Q * values) @ Q.T


SPECTRA = {
    "indefinite": torch.cat([torch.linspace(-3, 1, 57), torch.tensor([4.0, 6.0, 9.0])]).double(),
    "larger below": torch.cat([torch.tensor([-20.0]), torch.linspace(0, 1, 57), torch.tensor([2.0, 3.0])]).double(),
    "clustered": torch.cat([torch.linspace(0, 1, 57), torch.tensor([5.0, 5.0, 5.1])]).double(),
    "rank one": torch.tensor([0.0] * 59 + [2.0]).double(),
}


@pytest.mark.parametrize("basis", [256 * 2**20, 8 * 60 * 20], ids=["whole basis", "restarted"])
@pytest.mark.parametrize("name", SPECTRA)
def test_both_ends(name: str, basis: int) -> None:
    values = SPECTRA[name]
    M = symmetric(values)
    found = extremes(lambda v: M @ v, 60, bottom=1, tolerance=1e-9, max_products=400, basis_bytes=basis)
    (top,), (bottom,) = found.top, found.bottom
    assert top.converged
    assert top.value == pytest.approx(float(values.max()), rel=1e-9)
    assert float((M @ top.vector - top.value * top.vector).norm()) <= 2e-9 * float(values.abs().max())
    assert bottom.value >= float(values.min()) - 1e-9
    assert float((M @ bottom.vector - bottom.value * bottom.vector).norm()) == pytest.approx(bottom.residual, abs=1e-8)


def test_several_from_the_top() -> None:
    M = symmetric(SPECTRA["indefinite"])
    found = extremes(lambda v: M @ v, 60, top=3, tolerance=1e-10)
    assert [pair.value for pair in found.top] == pytest.approx([9.0, 6.0, 4.0], rel=1e-9)


def test_too_few_products_are_a_lower_bound_and_say_so() -> None:
    M = symmetric(SPECTRA["indefinite"])
    (top,) = extremes(lambda v: M @ v, 60, max_products=4, tolerance=1e-9).top
    assert not top.converged
    assert top.value < 9.0 <= top.value + top.residual + 9.0
    (late,) = extremes(lambda v: M @ v, 60, deadline=0.0).top
    assert not late.converged


@pytest.mark.parametrize("size", [1, 2])
def test_small_and_zero(size: int) -> None:
    found = extremes(lambda v: 0 * v, size, bottom=1)
    assert (found.top[0].value, found.top[0].converged, found.products) == (0.0, True, 1)
    M = symmetric(torch.tensor([3.0, -1.0][:size]).double())
    found = extremes(lambda v: M @ v, size, bottom=1)
    assert found.top[0].value == pytest.approx(3.0)
    assert found.top[0].converged


def test_restarts_lose_nothing() -> None:
    generator = torch.Generator().manual_seed(4)
    values = torch.cat([torch.linspace(-2, 1, 295), torch.tensor([1.02, 1.05, 1.1, 1.2, 1.25])]).double()
    M = symmetric(values)
    start = torch.randn(300, dtype=torch.float64, generator=generator)
    options = {"start": start, "top": 2, "tolerance": 1e-9, "max_products": 1000}
    small = extremes(lambda v: M @ v, 300, basis_bytes=8 * 300 * 24, **options)
    whole = extremes(lambda v: M @ v, 300, **options)
    assert 30 < whole.products <= small.products < 4 * whole.products
    for pair, value in zip(small.top, values.flip(0)[:2].tolist(), strict=True):
        assert pair.converged
        assert pair.value == pytest.approx(value, rel=1e-9)
        assert float((M @ pair.vector - pair.value * pair.vector).norm()) <= 1e-8


def test_what_is_not_finite_is_an_error() -> None:
    with pytest.raises(AnalysisError, match="NaN"):
        extremes(lambda v: v / 0 * 0, 5)
