"""The zoo: equal twins to the bit, harm decided by what the optimizer does, and a few specimens diagnosed."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn

from curvscope.diagnose.thresholds import SHIPPED
from curvscope.measure.signs import SIGNS
from docs.zoo import counted, page
from docs.zoo_cases import CAUSES, Case, Said, case_of, collect, said
from docs.zoo_fit import GRIDS, RULES, fitted, middle_of_best, thresholds, worth
from docs.zoo_tables import confusion, no_harm
from sample_models.data import Digits, load_digits
from sample_models.zoo import BATCH, FAULTS, POISONED, Specimen, healthy_key, long_outlook, outlook, twin, verdict
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
    assert long_outlook(first, 5) == long_outlook(second, 5)


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


@pytest.mark.parametrize(("fault", "factor"), [("group_lr", 10.0), ("init", 8.0)])
def test_faults_have_the_strength_asked_for(digits: Digits, fault: str, factor: float) -> None:
    healthy, sick, stronger = (
        twin(digits, "mlp", fault, 0, sick=strength > 1, strength=strength) for strength in (1.0, factor, 50.0)
    )
    for one, expected in ((sick, factor), (stronger, 50.0)):
        if fault == "init":
            ratio = (one.model[1].weight / healthy.model[1].weight).mean().item()  # type: ignore[union-attr, operator]
        else:
            ratio = one.optimizer.param_groups[0]["lr"] / healthy.optimizer.param_groups[0]["lr"]
        assert ratio == pytest.approx(expected, rel=1e-4)
    assert twin(digits, "mlp", fault, 0, sick=True).strength == FAULTS[fault].strengths[0] == factor


def test_the_batch_is_the_first_of_what_training_goes_on_with(digits: Digits) -> None:
    specimen = twin(digits, "mlp", "poisoned_example", 0, sick=True)
    assert torch.equal(specimen.images, specimen.stream[0][:BATCH])
    assert torch.equal(specimen.labels, specimen.stream[1][:BATCH])
    assert len(specimen.stream[1]) == len(digits.train_labels)
    sizes = specimen.stream[0].flatten(1).norm(dim=1)
    assert sizes.argmax() == POISONED
    assert sizes[POISONED] > 10 * sizes.median()


def test_a_long_outlook_draws_other_batches(digits: Digits) -> None:
    specimen = twin(digits, "mlp", "adam_eps", 0, sick=False)
    short, long = outlook(specimen, 4), long_outlook(specimen, 4)
    assert short[0] == long[0]
    assert short[1:] != long[1:]
    still = torch.optim.SGD(specimen.model.parameters(), lr=0.0)
    assert long_outlook(dataclasses.replace(specimen, optimizer=still), 2) == [short[0]] * 3


@pytest.fixture(scope="module")
def cases(digits: Digits) -> list[Case]:
    """A healthy network and two sick ones, harmed."""
    healthy = twin(digits, "mlp", "poisoned_example", 0, sick=False)
    expected = outlook(healthy), long_outlook(healthy, 8)
    sick = [twin(digits, "mlp", fault, 0, sick=True) for fault in ("poisoned_example", "group_lr")]
    return [case_of(specimen, expected) for specimen in (healthy, *sick)]


def test_harm_is_seen_and_named(cases: list[Case]) -> None:
    assert [case.truth for case in cases] == ["trains", "diverges", "diverges"]
    assert [case.harmed for case in cases] == [False, True, True]
    assert [case.healthy for case in cases] == [True, False, False]
    told = [said(case) for case in cases]
    assert not told[0].alarms
    assert all(one.cause for one in told[1:])
    assert told[2].layer


def test_findings_made_anew_are_those_of_the_run(cases: list[Case]) -> None:
    own = {name: getattr(SHIPPED, name) if name in RULES else SIGNS[name].threshold for name in GRIDS}
    for case in cases:
        assert said(case, SHIPPED) == said(case, thresholds(own)) == said(case)


def test_other_thresholds_say_other_things(cases: list[Case]) -> None:
    assert said(cases[2], thresholds({"learning_rate_ratio": 12.0, "part": 0.5})).first != "CS504"
    assert worth([said(case) for case in cases]) == (1, 1)
    assert worth([said(cases[0]), Said(cases[1], ())]) == (0, 0)


@pytest.mark.parametrize(
    ("worths", "place"),
    [
        ([1, 1, 1, 1, 1], 2),
        ([1, 1, 1, 1], 1),
        ([0, 1, 1, 1, 0], 2),
        ([1, 0, 1, 1, 0], 2),
        ([1, 1, 0, 1, 1, 1], 4),
        ([3], 0),
    ],
)
def test_the_middle_of_the_longest_run_of_the_best(worths: list[int], place: int) -> None:
    assert middle_of_best([(Fraction(value), Fraction(0)) for value in worths]) == place


def test_the_cause_decides_between_equals() -> None:
    assert middle_of_best([(Fraction(1), Fraction(0)), (Fraction(1), Fraction(1)), (Fraction(0), Fraction(2))]) == 1


def test_a_fit_takes_what_tells_sick_from_healthy(cases: list[Case]) -> None:
    """The rate's ratio is 10: limits under it name the cause, the middle of those is taken; what says nothing stays."""
    grids = {"learning_rate_ratio": (2.0, 4.0, 8.0, 16.0, 32.0), "attention_logit": (1.0, 2.0, 3.0)}
    assert fitted(cases, grids) == {"learning_rate_ratio": 4.0, "attention_logit": 2.0}


def test_runs_are_kept_and_read_again(digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("docs.zoo_cases.FAULTS", {"group_lr": FAULTS["group_lr"]})
    monkeypatch.setattr("docs.zoo_cases.SEEDS", 1)
    made = collect(digits, ["mlp"], tmp_path)
    assert [(case.sick, case.strength) for case in made] == [(False, 10.0), (True, 10.0)]
    monkeypatch.setattr("docs.zoo_cases.twin", None)
    again = collect(digits, ["mlp"], tmp_path)
    assert [said(case, SHIPPED) for case in again][1].first == "CS504"
    assert [case.place for case in again] == [case.place for case in made]


def test_tables_count(cases: list[Case]) -> None:
    told = [said(case) for case in cases]
    assert "| poisoned_example | 1 |  | **1** |" in confusion(told)
    idle = [dataclasses.replace(one, case=dataclasses.replace(one.case, later="spikes")) for one in told[:2]]
    assert "| spikes | 2 | 1 of 2 (50%) |" in no_harm(idle)
    assert counted(cases) == cases
    other = [dataclasses.replace(case, program="cnn") for case in cases]
    assert "2 of 2 (100%) | 0 of 1 (0%)" in page([*cases, *other], cases, ["mlp", "cnn"])


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
        "mlp",
        "kfac_damping_small",
        0,
        True,
        "",
        model,
        KFAC(model, 0.1, 1e-3),
        images,
        torch.zeros(1),
        torch.ones(1),
        (images, torch.zeros(1)),
    )
    assert specimen.given_optimizer == "kfac:lr=0.1,damping=0.001"
