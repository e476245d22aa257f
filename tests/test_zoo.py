"""The zoo: equal twins to the bit, harm decided by what the optimizer does, and a few specimens diagnosed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from docs.zoo import CAUSES, Case, analyzed, chosen_factor, confusion, said
from sample_models.data import Digits, load_digits
from sample_models.zoo import FAULTS, Specimen, healthy_key, outlook, twin, verdict
from sample_models.zoo_programs import KFAC, PROGRAMS, Attention, mlp


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.mark.parametrize(
    ("losses", "word"),
    [
        ([1.0, math.nan], "diverges"),
        ([1.0, 1.1, math.inf], "diverges"),
        ([1.0, *[1.21] * 5], "diverges"),
        ([1.0, *[1.19] * 5], "stalls"),
        ([1.0, 2.1, *[0.1] * 5], "spikes"),
        ([1.0, 1.9, *[0.1] * 5], "trains"),
        ([1.0, *[0.21] * 5], "stalls"),
        ([1.0, *[0.19] * 5], "trains"),
    ],
)
def test_verdict_on_both_sides(losses: list[float], word: str) -> None:
    assert verdict(losses, [1.0, *[0.1] * 5]) == word


def test_a_spike_is_the_sick_ones_own() -> None:
    spiking = [1.0, 2.1, *[0.1] * 5]
    assert verdict(spiking, spiking) == "spikes"
    assert verdict([1.0, 3.9, *[0.1] * 5], spiking) == "trains"


def test_at_least_twelve_faults_each_with_a_cause() -> None:
    assert len(FAULTS) >= 12
    assert set(CAUSES) == set(FAULTS)
    assert all(set(fault.programs) <= set(PROGRAMS) for fault in FAULTS.values())


@pytest.mark.parametrize("sick", [False, True])
def test_twins_are_equal_to_the_bit(digits: Digits, sick: bool) -> None:
    first, second = (twin(digits, "mlp", "poisoned_example", 1, sick=sick) for _ in range(2))
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(first.images, second.images)
    assert outlook(first, 5) == outlook(second, 5)


def test_an_outlook_leaves_the_specimen_as_it_is(digits: Digits) -> None:
    specimen = twin(digits, "recurrent", "adam_eps", 0, sick=False)
    before = [parameter.clone() for parameter in specimen.model.parameters()]
    steps = [state["step"].clone() for state in specimen.optimizer.state.values()]
    outlook(specimen, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, specimen.model.parameters(), strict=True))
    assert all(torch.equal(a, s["step"]) for a, s in zip(steps, specimen.optimizer.state.values(), strict=True))


def test_faults_share_a_healthy_twin_where_nothing_differs(digits: Digits) -> None:
    assert healthy_key("mlp", "group_lr", 0) == healthy_key("mlp", "poisoned_example", 0)
    assert healthy_key("mlp", "group_lr", 0) != healthy_key("mlp", "adam_eps", 0)
    one, other = (twin(digits, "mlp", name, 0, sick=False) for name in ("group_lr", "saturated_outputs"))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_attention_without_norms_runs_in_eval_mode() -> None:
    model = Attention(norms=False).eval()
    with torch.no_grad():
        assert torch.allclose(model(torch.ones(2, 1, 16, 16)), model.train()(torch.ones(2, 1, 16, 16)), atol=1e-6)


def test_kfac_steps_by_the_dense_damped_factors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 10)).double()
    images, labels = torch.randn(7, 5, dtype=torch.float64), torch.randint(10, (7,))
    optimizer = KFAC(model, lr=0.5, damping=0.1)
    optimizer.refresh(images)
    nn.functional.cross_entropy(model(images), labels).backward()
    layer = model[1]
    a = torch.cat([images, torch.ones(7, 1, dtype=torch.float64)], 1)
    p = model(images).detach().softmax(1)
    B = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    dense = torch.kron(B, a.T @ a / 7) + 0.1 * torch.eye(60, dtype=torch.float64)
    gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).flatten()
    before = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().flatten()
    optimizer.step()
    after = torch.cat([layer.weight, layer.bias[:, None]], 1).detach().flatten()
    torch.testing.assert_close(after, before - 0.5 * torch.linalg.solve(dense, gradient), rtol=1e-10, atol=1e-12)


def test_kfacs_input_rows_of_a_convolution_sum_to_its_gradient() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(12, 10).double())
    images, labels = torch.randn(1, 2, 4, 4, dtype=torch.float64), torch.tensor([3])
    optimizer = KFAC(model, lr=1.0, damping=1e12)
    optimizer.refresh(images)
    nn.functional.cross_entropy(model(images), labels).backward()
    before, gradient = conv.weight.detach().clone(), conv.weight.grad
    assert gradient is not None
    optimizer.step()
    torch.testing.assert_close((before - conv.weight) * 1e12, gradient, rtol=1e-2, atol=1e-3)
    assert optimizer.bases[0][1].shape == (19, 19)


@pytest.fixture(scope="module")
def cases(digits: Digits) -> list[Case]:
    """A healthy network and two sick ones, harmed."""
    healthy = twin(digits, "mlp", "poisoned_example", 0, sick=False)
    expected = outlook(healthy)
    found = [Case(healthy, verdict(expected, expected), analyzed(healthy))]
    for fault in ("poisoned_example", "group_lr"):
        specimen = twin(digits, "mlp", fault, 0, sick=True)
        found.append(Case(specimen, verdict(outlook(specimen), expected), analyzed(specimen)))
    return found


def test_harm_is_seen_and_named(cases: list[Case]) -> None:
    assert [case.truth for case in cases] == ["trains", "diverges", "diverges"]
    told = [said(case) for case in cases]
    assert not told[0].alarms
    assert all(one.cause for one in told[1:])
    assert told[2].layer


def test_findings_made_anew_are_those_of_the_run(cases: list[Case]) -> None:
    for case in cases:
        assert [row.code for row in said(case, 4.0).alarms] == [row.code for row in said(case).alarms]


def test_the_factor_is_the_largest_of_the_best(cases: list[Case]) -> None:
    assert chosen_factor(cases[:1]) == 12.0
    assert chosen_factor(cases) == 12.0
    assert "| poisoned_example | 1 |  | **1** |" in confusion([said(case) for case in cases])


def test_programs_have_the_layers_that_faults_strike() -> None:
    for program in PROGRAMS.values():
        names = {name for name, _ in program.build().named_modules()} | {
            name for name, _ in program.build().named_parameters()
        }
        assert {*program.layers, program.last} <= names


def test_kfac_is_given_in_words() -> None:
    model = mlp()
    images = torch.zeros(1, 1, 16, 16)
    specimen = Specimen(
        "mlp", "kfac_damping_small", 0, True, "", model, KFAC(model, 0.1, 1e-3), images, torch.zeros(1), torch.ones(1)
    )
    assert specimen.given_optimizer == "kfac:lr=0.1,damping=0.001"
