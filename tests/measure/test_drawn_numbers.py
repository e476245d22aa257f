"""Numbers from draws that are no sums of pairs: errors of eigenvalues and shares, and what draws can't tell."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import curvscope
from curvscope.diagnose.signs import sign_findings
from curvscope.measure.drawn_signs import Draws, condition_of_B, dead_outputs, position_share
from curvscope.measure.estimate import estimated_errors
from curvscope.measure.factor_estimate import NUMBERS, FactorOfDraws, spectrum_estimates
from curvscope.measure.jackknife import of_positive, t_95
from curvscope.measure.terms import Term
from curvscope.records import StabilityRow
from curvscope.run import Run
from tests import models
from tests.measure.coverages import blocks_of, repeated
from tests.measure.repeated import block_of

DRAWS = 8
T = t_95(DRAWS - 1)
PROBES = Draws("probe", DRAWS)


def naive_error(number: Callable[[Tensor], float], draws: Tensor) -> tuple[float, float]:
    """The value and the error that `of_positive` states, one deletion after the other."""
    K = len(draws)
    x = math.log(number(draws.mean(0)))
    each = [math.log(number(torch.cat([draws[:i], draws[i + 1 :]]).mean(0))) for i in range(K)]
    mean = sum(each) / K
    own = (K - 1) / K * sum((one - mean) ** 2 for one in each)
    bias = (K - 1) * (mean - x)
    return math.exp(x), math.exp(x) * math.expm1(t_95(K - 1) * math.sqrt(own + 4 * bias**2)) / t_95(K - 1)


def random_factors(groups: int = 1) -> tuple[Tensor, Tensor]:
    """A [G, 3, 3] and B of every draw [K, G, 4, 4], float64."""
    torch.manual_seed(3)
    a = torch.randn(groups, 3, 5, dtype=torch.float64)
    g = torch.randn(DRAWS, groups, 4, 9, dtype=torch.float64)
    return a @ a.mT, g @ g.mT


@pytest.mark.parametrize("groups", [1, 2])
def test_numbers_of_a_spectrum_are_those_of_the_formed_matrix(groups: int) -> None:
    A, B = random_factors(groups)
    given = (A[0], B[:, 0]) if groups == 1 else (A, B)
    found = spectrum_estimates(
        Term("", given[0], given[1].sum(0), False, given[1], 1.0), FactorOfDraws.of(given[1], 1e-12)
    )
    assert found is not None

    def eigenvalues(mean: Tensor) -> Tensor:
        return torch.cat([torch.linalg.eigvalsh(torch.kron(mean[g] * DRAWS, A[g])) for g in range(groups)])

    def entropy(mean: Tensor) -> float:
        p = eigenvalues(mean) / eigenvalues(mean).sum()
        return math.exp(-float((p * p.log()).sum()))

    wanted: dict[str, Callable[[Tensor], float]] = {
        "lambda_max": lambda mean: float(eigenvalues(mean).max()),
        "lambda_min_positive": lambda mean: float(eigenvalues(mean).min()),
        "condition": lambda mean: float(eigenvalues(mean).max() / eigenvalues(mean).min()),
        "effective_rank": entropy,
    }
    assert set(wanted) == set(NUMBERS)
    for name, number in wanted.items():
        value, stderr = naive_error(number, B)
        assert found[name].value == pytest.approx(value, rel=1e-10), name
        assert found[name].stderr == pytest.approx(stderr, rel=1e-7), name


def test_the_smallest_eigenvalue_needs_draws_that_fill_the_range() -> None:
    A, _ = random_factors()
    g = torch.randn(DRAWS, DRAWS, 1, dtype=torch.float64)  # one direction a draw: rank 8 of 8, and 7 without any
    found = spectrum_estimates(
        Term("", A[0], torch.zeros(8, 8), False, g @ g.mT, 1.0), FactorOfDraws.of(g @ g.mT, 1e-12)
    )
    assert found is not None
    assert math.isnan(found["lambda_min_positive"].value) and math.isnan(found["condition"].value)
    assert found["lambda_max"].stderr > 0


def test_wide_factors_and_single_draws_have_no_errors() -> None:
    assert FactorOfDraws.of(torch.zeros(2, 1025, 1025), 1e-12) is None
    assert FactorOfDraws.of(torch.eye(3)[None], 1e-12) is None
    zero = of_positive(torch.zeros(1), torch.zeros(4, 1))[0]
    assert zero.value == 0.0 and math.isnan(zero.stderr)


@pytest.mark.parametrize(("model", "draws"), [("mlp", 8), ("tokens", 8), ("autoencoder", 8), ("mlp", 4)])
def test_intervals_of_eigenvalues_hold_the_exact_ones(model: str, draws: int) -> None:
    """Also where B is a multiple of the identity (a squared loss), whose eigenvalues draws always spread."""
    repetitions, t = 60, t_95(draws - 1)
    source = repeated(model)
    held: list[float] = []
    for layer, exact in source.exact.items():
        if exact.spec.exact_only:
            continue
        A, B = exact.factors["expand"]
        values = torch.outer(torch.linalg.eigvalsh(B), torch.linalg.eigvalsh(A)).flatten()
        values = values[values > 1e-12 * values.max()]  # softmax ignores a shift: B of the last layer is singular
        want = {
            "lambda_max": float(values.max()),
            "condition": float(values.max() / values.min()),
        }
        inside = dict.fromkeys(want, 0)
        for seed in range(repetitions):
            drawn = source.drawn("probe", seed, draws)[layer]
            term = Term("", A, drawn.factors["expand"][1], False, drawn.probe_B["expand"], 1.0)
            found = spectrum_estimates(term, FactorOfDraws.of(drawn.probe_B["expand"], 1e-14))
            assert found is not None
            for name, number in want.items():
                inside[name] += abs(found[name].value - number) <= t * found[name].stderr
        held += [count / repetitions for count in inside.values()]
    # 90 %, three binomial standard errors of the repetition below it
    assert min(held) >= 0.9 - 3 * (0.9 * 0.1 / repetitions) ** 0.5
    assert sum(held) / len(held) >= 0.92


def test_the_share_of_a_position_carries_its_error() -> None:
    torch.manual_seed(0)
    energy = torch.rand(DRAWS, 5, dtype=torch.float64) + torch.tensor([0.0, 0.0, 2.0, 0.0, 0.0])
    row = position_share("body", energy, PROBES)
    value, stderr = naive_error(lambda mean: float(mean[2] / mean.sum()), energy)
    assert (row.value, row.value_stderr) == (pytest.approx(value), pytest.approx(stderr))
    assert (row.low, row.high) == (pytest.approx(value - T * stderr), pytest.approx(value + T * stderr))
    assert row.status == "estimated" and "position 2 of 5" in row.reason
    # its bar reaches the threshold of one half: no verdict
    wide = torch.tensor([[0.9, 0.1, 0, 0]] * 4 + [[0.2, 0.8, 0, 0]] * 4, dtype=torch.float64)
    assert position_share("body", wide, PROBES).verdict == "undecided"
    assert position_share("body", wide, dataclasses.replace(PROBES, refused="few")).status == "not_assessed"


def test_the_condition_of_a_drawn_factor() -> None:
    _, B = random_factors()
    row, resolved = condition_of_B("body", B[:, 0].sum(0), B[:, 0], PROBES)

    def ratio(mean: Tensor) -> float:
        values = torch.linalg.eigvalsh(mean[0])
        return float(values[-1] / values[0])

    value, stderr = naive_error(ratio, B)
    assert (row.value, row.value_stderr) == (pytest.approx(value), pytest.approx(stderr))
    assert row.status == resolved.status == "estimated"
    assert resolved.verdict == "below"
    # a direction that no draw has: singular by half of the draws as by all
    P = torch.eye(4, dtype=torch.float64) - 0.25
    flat = P @ B[:, 0] @ P
    row, resolved = condition_of_B("body", flat.sum(0), flat, PROBES)
    assert row.status == "not_assessed" and resolved.value == 0.25
    assert (resolved.verdict, resolved.status) == ("above", "estimated")
    assert "3 of 4" in resolved.reason and "half of 8 probes" in resolved.reason
    # one direction a draw: what is missing may be for want of draws
    g = torch.randn(DRAWS, 12, 1, dtype=torch.float64)
    for row in condition_of_B("body", (g @ g.mT).sum(0), g @ g.mT, PROBES):
        assert row.status == "not_assessed" and "do not fill" in row.reason


def test_dead_outputs_under_draws_are_bounds() -> None:
    probed, labelled = dead_outputs("body", 0.75, PROBES), dead_outputs("body", 0.75, Draws("mc", DRAWS))
    assert (probed.verdict, probed.status) == ("above", "estimated") and "0.0039" in probed.reason
    assert (labelled.verdict, labelled.status) == ("undecided", "estimated")
    assert dead_outputs("body", 0.25, Draws("mc", DRAWS)).verdict == "below"


@cache
def run(fisher: str, samples: int | None = None) -> Run:
    torch.manual_seed(0)
    model, batch = models.TokenModel(3, 4), (torch.randn(16, 6, 3), torch.randint(4, (16, 6)))
    loss = "cross_entropy:class_axis=last"
    return curvscope.analyze(model, batch, loss=loss, fisher=fisher, samples=samples, dtype="float64")


@pytest.mark.parametrize("fisher", ["probe", "mc"])
def test_nothing_from_draws_looks_exact(fisher: str) -> None:
    found, exact = run(fisher), run("exact")
    for name, layer in found.layers.items():
        if not layer.factors:
            continue
        signs = {row.quantity: row for row in layer.signs}
        for quantity in ("condition_B", "unresolved_B", "dead_outputs", "position_share", "example_share"):
            row = signs[quantity]
            assert row.status in ("estimated", "not_assessed") and row.reason, (name, quantity)
            if row.status == "estimated" and quantity in ("condition_B", "position_share"):
                assert row.value_stderr > 0
        assert signs["example_share"].status == "not_assessed" and not layer.examples
        assert signs["condition_A"] == {row.quantity: row for row in exact.layers[name].signs}["condition_A"]
        for key in ("expand", "reduce"):
            assert layer.attributes[f"{key}/B/draws"] == DRAWS
            assert layer.attributes[f"{key}/B/lambda_max_stderr"] > 0
            assert f"{key}/A/draws" not in layer.attributes
        for spectrum in layer.spectra.values():
            assert spectrum.status == "estimated"
            for number in ("trace", "lambda_max", "condition", "stable_rank", "effective_rank"):
                value, stderr = getattr(spectrum, number), getattr(spectrum, f"{number}_stderr")
                assert math.isnan(value) or stderr > 0, (name, spectrum.approximation, number)
    assert not any("draws" in key for layer in exact.layers.values() for key in layer.attributes)


def test_errors_of_factors_are_in_the_losss_unit_and_in_the_file(tmp_path: Any) -> None:
    found = run("probe")
    layer = found.layers["head"]
    found.save(tmp_path / "run.h5")
    again = curvscope.open(tmp_path / "run.h5").layers["head"]
    assert again.attributes["expand/B/lambda_max_stderr"] == layer.attributes["expand/B/lambda_max_stderr"]
    factors = layer.factors["expand"]
    largest = layer.spectra["kfac_expand"]
    top = float(torch.linalg.eigvalsh(torch.as_tensor(factors.A)).max())
    # lambda_max of B (x) A is that of B times an exact number, and so is its error
    assert largest.lambda_max_stderr == pytest.approx(layer.attributes["expand/B/lambda_max_stderr"] * top)
    kept = {row.quantity: row for row in curvscope.open(tmp_path / "run.h5").tables["stability"] if row.layer == "head"}
    want = {row.quantity: row for row in layer.signs}["position_share"].value_stderr
    assert kept["position_share"].value_stderr == want > 0


def test_one_draw_gives_no_errors() -> None:
    layer = run("mc", 1).layers["head"]
    assert layer.row.better_flavour == ""
    assert layer.errors["kfac_expand"].reason.startswith("1 draw gives no error bar")
    assert math.isnan(layer.spectra["kfac_expand"].lambda_max_stderr)
    assert layer.spectra["kfac_expand"].reason.startswith("1 draw gives")
    signs = {row.quantity: row for row in layer.signs}
    assert signs["condition_B"].status == signs["position_share"].status == "not_assessed"


def test_the_better_flavour_heeds_the_error_bar() -> None:
    """It is told where it is right, but for one time in ten at most, and undecided elsewhere."""
    source, said = repeated("tokens"), []
    for layer in ("q", "v", "head"):
        block, errors = block_of(source.exact[layer]).dense(), {}
        for flavour, (A, B) in source.exact[layer].factors.items():
            errors[flavour] = float((block - torch.kron(B, A)).norm())
        right = min(errors, key=lambda name: errors[name])
        for seed in range(30):
            drawn = source.drawn("probe", seed, DRAWS)[layer]
            said.append((estimated_errors(layer, "probe", drawn, blocks_of(drawn)).better, right))
    told = [(better, right) for better, right in said if better in ("expand", "reduce")]
    assert told and len(told) < len(said)
    assert sum(better != right for better, right in told) <= 0.1 * len(said)
    assert {better for better, _ in said} <= {"expand", "reduce", "undecided"}


def test_findings_say_the_interval() -> None:
    row = StabilityRow(
        "layer", "body", "position_share", 0.8, 0.6, 1.0, 0.5, "above", value_stderr=0.09, status="estimated",
        reason="position 0 of 6, from 8 probes",
    )  # fmt: skip
    (found,) = sign_findings([row])
    assert "80% (60% to 100%)" in found.row.evidence and "8 probes" in found.row.evidence
