"""The proof: a perturbation along the top direction grows under real torch.optim steps as predicted."""

from __future__ import annotations

import pytest

import curvscope
from tests.growth import OPTIMIZERS, SAMPLES, Sample, growths, kfac_growths, load_sample, predicted_root

WITHIN = 0.05


@pytest.fixture(scope="module")
def mlp() -> Sample:
    return load_sample("digits_mlp")


@pytest.mark.parametrize("factor", [0.7, 1.3], ids=["stable", "unstable"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_growth_on_the_mlp(name: str, factor: float, mlp: Sample) -> None:
    top, predicted, measured = growths(mlp, OPTIMIZERS[name], factor)
    assert (predicted > 1) == (factor > 1)
    assert predicted == pytest.approx(abs(predicted_root(top)), rel=1e-12)
    assert measured == pytest.approx(predicted, rel=WITHIN)


@pytest.mark.parametrize("name", ["digits_cnn", "digits_vit"])
def test_growth_of_adamw_on_the_other_samples(name: str) -> None:
    _, predicted, measured = growths(load_sample(name), OPTIMIZERS["AdamW"], 1.3)
    assert measured == pytest.approx(predicted, rel=WITHIN)


@pytest.mark.parametrize("factor", [0.7, 1.3], ids=["stable", "unstable"])
def test_growth_of_kfac(factor: float, mlp: Sample) -> None:
    run = curvscope.analyze(SAMPLES / "digits_mlp.pt", dtype="float64")
    _, predicted, measured = kfac_growths(mlp, run, 0.05, factor)
    assert (predicted > 1) == (factor > 1)
    assert measured == pytest.approx(predicted, rel=WITHIN)
