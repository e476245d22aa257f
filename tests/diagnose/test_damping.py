"""Every CS4xx on both sides of its threshold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest

from curvscope.diagnose import damping
from curvscope.diagnose.rules import find
from curvscope.records import DampingRow, GlobalDampingRow, Layer, LayerRow, ModelInfo, RangeRow

NAN = math.nan


def layer(ranges: Sequence[RangeRow], name: str = "one", better: str = "expand") -> Layer:
    row = LayerRow(name, "linear", 4, 3, True, 1, 15, 6, 5.0, 12, better)
    step = DampingRow(name, f"kfac_{better}", "eigenbasis", 1e-3, mark="current", predicted_decrease=-2.0, rho=-4.0)
    return Layer(row, damping=[step], ranges=ranges)


def found_range(form: str = "eigenbasis", approximation: str = "kfac_expand", **fields: float | str) -> RangeRow:
    given = {"current": 1e-3, "low": 0.01, "high": 10.0, "recommended": 0.1, "decrease": 1.0, "gain": 0.5} | fields
    return RangeRow("one", approximation, form, **given)  # type: ignore[arg-type]


def codes(one: Layer) -> list[str]:
    return [row.code for _, _, row in damping.of_layer(one)]


def test_too_small_needs_every_form() -> None:
    small, safe = found_range(standing="too_small"), found_range("factored", standing="safe")
    assert codes(layer([small, found_range("factored", standing="too_small")])) == ["CS401"]
    assert codes(layer([small, safe])) == []
    # a form that is undefined has no say
    undefined = RangeRow("one", "kfac_expand", "factored", status="not_assessed", reason="pi")
    assert codes(layer([small, undefined])) == ["CS401"]


@pytest.mark.parametrize(("rate", "severity"), [(0.301, "warning"), (0.3, "info"), (NAN, "warning")])
def test_too_small_counts_where_too_much_of_the_step_is_taken(rate: float, severity: str) -> None:
    """alpha_star is 0.2: up to 1.5 times that the step as taken keeps a quarter of what it promises."""
    one = layer([found_range(standing="too_small")])
    one.damping[0] = dataclasses.replace(one.damping[0], alpha_star=0.2)  # type: ignore[index]
    [(rank, _, row)] = damping.of_layer(one, rate)
    assert (row.code, row.severity, rank) == ("CS401", severity, 1 if severity == "warning" else 2)
    assert ("learning rate" in row.evidence) == (severity == "info")


def test_a_step_so_short_keeps_a_quarter_of_its_promise() -> None:
    """Random layers, K-FAC's M and the exact G: at eta = 1.5 alpha_star the ratio is at least 1/4, and nearly that."""
    rng = np.random.default_rng(0)
    least = math.inf
    for _ in range(200):
        roots = rng.standard_normal((2, 5, 5)) * 10.0 ** rng.uniform(-3, 1, (2, 1, 5))
        G, M = roots @ roots.transpose(0, 2, 1)
        g, mu = rng.standard_normal(5), 10.0 ** rng.uniform(-6, 0)
        step = -np.linalg.solve(M + mu * np.eye(5), g)
        alpha = -(g @ step) / (step @ (G + mu * np.eye(5)) @ step)
        eta = 1.5 * alpha
        promised = -(g @ step) * eta - eta**2 / 2 * step @ M @ step
        if promised > 0:
            least = min(least, (-(g @ step) * eta - eta**2 / 2 * step @ G @ step) / promised)
    assert 0.25 - 1e-9 <= least < 0.26


def test_too_small_in_words() -> None:
    row = damping.of_layer(layer([found_range(standing="too_small", noise_below=1e-3)]))[0][2]
    assert "grows" in row.evidence
    assert "amplified" in row.evidence
    assert "0.1" in row.remedy
    calm = damping.of_layer(layer([found_range(standing="too_small", noise_below=9e-4)]))[0][2]
    assert "amplified" not in calm.evidence


@pytest.mark.parametrize(("gain", "said"), [(0.101, True), (0.1, False), (NAN, False)])
def test_too_large_counts_where_something_is_lost(gain: float, said: bool) -> None:
    assert codes(layer([found_range(standing="too_large", gain=gain)])) == (["CS402"] if said else [])


@pytest.mark.parametrize(("gap", "said"), [(0.251, True), (0.25, False), (NAN, False)])
def test_forms_that_differ(gap: float, said: bool) -> None:
    forms = [found_range(form, form_gap=gap, standing="safe") for form in ("eigenbasis", "factored")]
    assert codes(layer(forms)) == (["CS404"] if said else [])


def test_only_the_better_flavour_speaks() -> None:
    other = found_range(approximation="kfac_expand", standing="too_small")
    own = found_range(approximation="kfac_reduce", standing="safe")
    assert codes(layer([other, own], better="reduce")) == []
    assert codes(layer([other, own], better="expand")) == ["CS401"]


@pytest.mark.parametrize(("factor", "said"), [(100.1, True), (99.9, False)])
def test_spread(factor: float, said: bool) -> None:
    ranges = {"a": (0.1, 0.01, 1.0), "b": (0.1 * factor, 1.1, 100.0)}
    layers = {
        name: layer([found_range(recommended=best, low=low, high=high)], name)
        for name, (best, low, high) in ranges.items()
    }
    assert [row.code for _, _, row in damping.of_network(layers)] == (["CS403"] if said else [])
    assert damping.of_network({"a": layers["a"]}) == []
    shared = layer([found_range(recommended=0.1 * factor, low=0.9)], "b")
    assert damping.of_network({"a": layers["a"], "b": shared}) == []  # 0.9 to 1 is safe for both


def test_nothing_known_nothing_said() -> None:
    assert codes(layer([])) == []
    assert codes(layer([found_range(current=NAN, gain=NAN)])) == []


def joint_row(form: str = "eigenbasis", approximation: str = "kfac_expand", **fields: float) -> GlobalDampingRow:
    given = {
        "damping": 0.4,
        "change": -0.02,
        "safe_damping": 0.5,
        "current": 1e-3,
        "current_change": 0.01,
        "current_alpha_star": 0.2,
    }
    return GlobalDampingRow(approximation, form, **(given | fields))


@pytest.mark.parametrize(("gain", "said"), [(NAN, False), (0.001, True), (0.0, False), (-0.2, False)])
def test_a_spread_that_gains_nothing_together_is_not_told(gain: float, said: bool) -> None:
    layers = {
        name: layer([found_range(recommended=best, low=low, high=high)], name)
        for name, best, low, high in (("a", 1e-3, 1e-4, 1e-2), ("b", 1.0, 0.1, 10.0))
    }
    joint = joint_row(per_layer_change=-0.02 * (1 + gain), per_layer_gain=gain)
    found = damping.of_network(layers, [joint])
    assert [row.code for _, _, row in found] == (["CS403"] if said else [])
    assert damping.of_network(layers, [dataclasses.replace(joint, form="factored", per_layer_change=0.1)])


def together(
    joint: Sequence[GlobalDampingRow], others: Sequence[damping.Ranked] = (), rate: float = NAN, better: str = "expand"
) -> list[str]:
    layers = {"one": layer([found_range(standing="safe")], better=better)}
    return [row.code for _, _, row in damping.together(layers, joint, others, rate)]


@pytest.mark.parametrize(("change", "said"), [(1e-9, True), (-1e-9, False), (NAN, False)])
def test_safe_alone_not_together_is_a_joint_step_that_raises_the_loss(change: float, said: bool) -> None:
    assert together([joint_row(current_change=change)]) == (["CS405"] if said else [])
    # the optimizer's form is not known: every form that could be judged has to raise it
    other = joint_row("factored", current_change=-0.01)
    assert together([joint_row(current_change=change), other]) == []
    unknown = joint_row("factored", current_change=NAN)
    assert together([joint_row(current_change=change), unknown]) == (["CS405"] if said else [])


@pytest.mark.parametrize(("rate", "said"), [(0.301, True), (0.3, False)])
def test_together_counts_where_too_much_of_the_step_is_taken(rate: float, said: bool) -> None:
    assert together([joint_row()], rate=rate) == (["CS405"] if said else [])


def test_together_speaks_of_the_better_flavour_and_where_no_layer_objects() -> None:
    assert together([joint_row()], better="reduce") == []
    assert together([joint_row(approximation="kfac_reduce")], better="reduce") == ["CS405"]
    small = layer([found_range(standing="too_small")])
    assert together([joint_row()], damping.of_layer(small)) == []
    # one that is told as info, the learning rate being small, does not object
    small.damping[0] = dataclasses.replace(small.damping[0], alpha_star=0.2)  # type: ignore[index]
    assert together([joint_row(current_alpha_star=0.1)], damping.of_layer(small, 0.3), 0.3) == ["CS405"]


def test_together_advises_what_was_safe_together() -> None:
    [(_, _, row)] = damping.together({"one": layer([found_range(standing="safe")])}, [joint_row()], [], NAN)
    assert row.remedy == "Raise the damping of all layers to 0.5."
    assert "raises the loss by 0.01;" in row.evidence


def test_what_to_set_is_of_the_flavour_with_the_lower_loss() -> None:
    """The layer's better K-FAC is expand; all together reduce has the lower loss, and its values go together."""
    ranges = [
        found_range(standing="too_small", joint=0.2),
        found_range(approximation="kfac_reduce", joint=0.7, standing="safe"),
    ]
    summaries = [joint_row(), joint_row(approximation="kfac_reduce", change=-0.03, safe_damping=0.9)]
    [(_, _, row)] = damping.of_layer(layer(ranges), joint=summaries)
    assert row.remedy == (
        "Raise the damping of this layer to 0.7, with all others at theirs (column set) by K-FAC-reduce, or of all "
        "layers to 0.9 (K-FAC-reduce)."
    )
    # withheld values are not advised
    ranges[1] = dataclasses.replace(ranges[1], joint=NAN)
    [(_, _, row)] = damping.of_layer(layer(ranges), joint=summaries)
    assert row.remedy == "Raise the damping of all layers to 0.9 (K-FAC-reduce)."
    [(_, _, row)] = damping.of_layer(layer(ranges), joint=summaries[:1])
    assert "of this layer to 0.2, with all others at theirs (column set), or of all layers to 0.5." in row.remedy


MODEL = ModelInfo("Net", "net.pt", "mse", 1.0, 1.0, 100, 1.0, 4, "[4, 2]")


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [("", True), ("K-FAC, lr 0.1, damping 0.001", True), ("Shampoo, lr 0.1", False), ("AdamW, lr 0.1", False)],
)
def test_only_kfac_is_told_of_kfacs_damping(optimizer: str, said: bool) -> None:
    model = dataclasses.replace(MODEL, optimizer=optimizer)
    small, safe = ({"one": layer([found_range(standing=standing)])} for standing in ("too_small", "safe"))
    told = {row.code for row in find(model, small, [])} | {
        row.code for row in find(model, safe, [], joint=[joint_row()])
    }
    assert ({"CS401", "CS405"} <= told) == said
    assert said or not any(code.startswith("CS4") for code in told)
