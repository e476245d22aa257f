"""The strip of a layer's damping, and the damping sections of the report."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
from rich.cells import cell_len
from rich.console import Console

from curvscope.present.meanings import meaning
from curvscope.present.names import some
from curvscope.present.strip import strip
from curvscope.present.terminal import render
from curvscope.records import TABLES, DampingRow, RangeRow, Run
from tests.synthetic import LAYERS, make_run


def rows(decreases: list[float], off_grid: float | None = None) -> list[DampingRow]:
    """A grid from 1e-8 of a mean eigenvalue of 2, with one more value if wanted."""
    found = [
        DampingRow("l", "kfac_expand", "eigenbasis", 2 * 10.0 ** (i - 8), 10.0 ** (i - 8), predicted_decrease=value)
        for i, value in enumerate(decreases)
    ]
    if off_grid is not None:
        found.append(
            DampingRow("l", "kfac_expand", "eigenbasis", off_grid, off_grid / 2, "current", predicted_decrease=9.0)
        )
    return found


def found_range(**fields: float) -> RangeRow:
    return RangeRow("l", "kfac_expand", "eigenbasis", **fields)


@pytest.mark.parametrize(
    ("decreases", "fields", "drawn"),
    [
        ([-1.0, 0.0, 2.0, 8.0, 4.0], {"low": 2e-6, "high": 3e-5}, "××[▃█]▅"),
        ([-1.0, 0.0, 2.0, 8.0, 4.0], {"low": 1e-6, "high": 3e-5, "current": 5e-8}, "×|×[▃█]▅"),
        ([1.0, 2.0], {}, "[▅█]"),
        ([1.0, 2.0], {"low": 1.0, "high": 0.1}, "▅█"),
        ([1.0, math.nan], {"current": 1.0}, "[█–]|"),
        ([math.nan, math.nan], {}, "[––]"),
        ([], {}, ""),
    ],
)
def test_strip(decreases: list[float], fields: dict[str, float], drawn: str) -> None:
    assert strip(rows(decreases), found_range(**fields)) == drawn


def test_strip_of_values_off_the_grid_has_no_cell_for_them() -> None:
    assert strip(rows([1.0, 2.0], off_grid=5e-8), found_range(current=5e-8)) == "[▅|█]"


def test_strip_without_a_range_has_no_brackets() -> None:
    unknown = dataclasses.replace(found_range(), status="not_assessed")
    assert strip(rows([-1.0, -2.0]), unknown) == "××"


def test_strip_in_ascii() -> None:
    drawn = strip(rows([-1.0, 2.0, 8.0, math.nan]), found_range(current=1e-7), ascii_only=True)
    assert drawn == "[x|-#?]"


def page(run: Run, layer: str | None = None, *, width: int = 100, encoding: str = "utf-8", color: bool = False) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    render(run, Console(file=file, width=width, no_color=not color), layer, "run.h5")
    return raw.getvalue().decode(encoding)


def section(text: str, start: str, end: str) -> list[str]:
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(start))
    last = next(i for i, line in enumerate(lines[first + 1 :], first + 1) if line.startswith(end))
    return [line.rstrip() for line in lines[first:last]]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_one_line_a_layer_at_every_width(width: int, encoding: str) -> None:
    lines = section(page(make_run(), width=width, encoding=encoding), "damping of", "parameters")
    assert all(cell_len(line) <= width for line in lines)
    bracketed = [line for line in lines if "[" in line and "[ ]" not in line]
    assert len(bracketed) == sum(spec[6] is not None for spec in LAYERS)


def test_overview_at_80_columns() -> None:
    lines = section(page(make_run(), width=80), "damping of", "parameters")
    assert lines[1].split()[:3] == ["from", "1e-8", "of"]
    assert lines[4].startswith(" stem.conv")
    assert "0.00238 to 1.07" in lines[4]
    assert "|" in lines[4]
    assert "the optimizer's damping, 0.0300" in " ".join(" ".join(lines).split())


def test_overview_without_exact_columns_says_why() -> None:
    text = " ".join(page(make_run("probe")).split())
    assert "damping of the better K-FAC" in text
    assert "--fisher exact gives it" in text


def test_overview_without_a_current_value() -> None:
    run = make_run()
    for layer in run.layers.values():
        layer.ranges = [dataclasses.replace(row, current=math.nan, standing="") for row in layer.ranges]
    lines = section(page(run), "damping of", "parameters")
    assert not any("|" in line for line in lines)
    assert "now" not in lines[2]


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ("", ""),
        ("K-FAC, lr 0.1, damping 0.03", ""),
        ("SGD, lr 0.1", "SGD has no such damping"),
        ("Shampoo, lr 0.1", "Shampoo's damping is inside a root"),
    ],
)
@pytest.mark.parametrize("fisher", ["exact", "probe"])
def test_overview_says_whom_it_concerns(optimizer: str, words: str, fisher: str) -> None:
    run = make_run(fisher)
    run.model = dataclasses.replace(run.model, optimizer=optimizer)
    text = " ".join(section(page(run), "damping of", "parameters"))
    assert words in text
    assert bool(words) == ("no such damping" in text or "in other units" in text)


def test_layers_without_a_strip_are_named_with_the_reason() -> None:
    run = make_run()
    [first, second, *_] = [layer for layer in run.layers.values() if layer.ranges]
    name = f"kfac_{'reduce' if first.row.better_flavour == 'reduce' else 'expand'}"
    first.ranges = [row for row in first.ranges if row.approximation == "diag"]
    first.damping = [DampingRow(first.name, name, "eigenbasis", status="not_assessed", reason="two roles, no inverse")]
    second.ranges = [dataclasses.replace(row, status="not_assessed", reason="nothing lowers") for row in second.ranges]
    lines = section(page(run, width=140), "damping of", "parameters")
    assert f" – not assessed: {first.name}: two roles, no inverse" in lines
    assert f" – not assessed: {second.name}: nothing lowers" in lines


@pytest.mark.parametrize(("width", "named"), [(140, False), (80, True)])
def test_layer_page_names_the_columns_it_has_no_room_for(width: int, named: bool) -> None:
    lines = section(page(make_run(), "stem.conv", width=width), "damping", "factors")
    header = " ".join(lines)
    assert ("No room here for" in header) == named
    assert all(cell_len(line) <= width for line in lines)
    words = " ".join(header.split())
    assert not named or "condition" in words.partition("No room here for")[2]


def test_layer_page_has_every_form_and_value() -> None:
    text = page(make_run(), "stem.conv", width=140)
    lines = section(text, "damping", "factors")
    named = [line.split()[:2] for line in lines if "eigenbasis " in line[:40] or "factored " in line[:40]]
    assert ["kfac_expand", "factored"] in named
    assert ["kfac_reduce*", "eigenbasis"] in named
    assert ["diag", "eigenbasis"] in named
    assert sum(" now " in line for line in lines) >= 2
    assert sum(" best " in line and "safe" not in line for line in lines) >= 2
    assert sum("1.0e-8" in line for line in lines) == 2


def test_layer_page_says_why_there_is_nothing() -> None:
    lines = section(page(make_run(), "wide", width=140), "damping", "factors")
    assert any("not assessed" in line and "min(P, N K)" in line for line in lines)


@pytest.mark.parametrize("table", ["damping", "ranges"])
def test_every_column_has_a_meaning(table: str) -> None:
    assert all(meaning(table, column) for column in TABLES[table].__dataclass_fields__)


@pytest.mark.parametrize(("joint", "told"), [(0.5, False), (0.51, True)])
def test_layers_that_the_joint_value_leaves_with_plain_steps_are_named(joint: float, told: bool) -> None:
    run = make_run()
    name = LAYERS[0][0]
    layer = run.layers[name]
    row = found_range(low=0.1, high=0.5, recommended=0.2, joint=joint)
    better = f"kfac_{'reduce' if layer.row.better_flavour == 'reduce' else 'expand'}"
    for other in run.layers.values():
        other.ranges = []
    layer.ranges = [dataclasses.replace(row, layer=name, approximation=one) for one in {better, "kfac_reduce"}]
    text = io.StringIO()
    render(run, Console(file=text, width=120))
    words = " ".join(text.getvalue().split())
    assert "above which the step is plain gradient descent" in words
    assert (f"which leaves {name} with plain gradient steps" in words) == told


def test_values_to_set_are_of_one_flavour_and_those_without_say_why() -> None:
    """kfac_reduce has the lower loss in the steps of all layers: its values stand in every row."""
    run = make_run()
    found = [layer for layer in run.layers.values() if layer.ranges]
    assert {layer.row.better_flavour for layer in found} >= {"expand", "reduce"}
    for number, layer in enumerate(found):
        layer.ranges = [
            dataclasses.replace(row, joint=777.0 + number if row.approximation == "kfac_reduce" else 1e-3)
            for row in layer.ranges
        ]
    own = found[-1]
    why = "at every damping of the grid; joint: no value of its own, it takes the one for all layers"
    own.ranges = [dataclasses.replace(row, joint=math.nan, reason=why) for row in own.ranges]
    lines = section(page(run, width=140), "damping of", "parameters")
    rows = [line.split()[-1] for line in lines if "[" in line and "[ ]" not in line]
    assert rows[:-1] == [f"{777 + number}" for number in range(len(found) - 1)]
    words = " ".join(" ".join(lines).split())
    assert "set: where all move by K-FAC-reduce, its best times a common factor" in words
    assert (
        f"– no value to set of {own.name}: K-FAC-reduce: no value of its own, it takes the one for all layers" in words
    )


def test_values_that_are_withheld_have_no_column_but_a_reason() -> None:
    run = make_run()
    why = "joint: dampings of each layer's own do no better together than one for all"
    for layer in run.layers.values():
        layer.ranges = [dataclasses.replace(row, joint=math.nan, reason=why) for row in layer.ranges]
    lines = section(page(run, width=140), "damping of", "parameters")
    assert "all move:" not in " ".join(lines)
    [told] = [line for line in lines if "no value to set" in line]
    assert told == f" – no value to set: K-FAC-reduce: {why.removeprefix('joint: ')}"


@pytest.mark.parametrize(("width", "named"), [(60, True), (140, False)])
def test_overview_names_the_columns_it_has_no_room_for(width: int, named: bool) -> None:
    words = " ".join(" ".join(section(page(make_run(), width=width), "damping of", "parameters")).split())
    header = words.partition("strip: ")[0]
    assert ("No room here for" in header) == named
    for column in ("best", "safe", "now"):
        assert column in header


def test_a_bare_number_is_told_to_be_a_layers_name() -> None:
    assert some(["8"], "layer") == "layer 8"
    assert some(["net.0", "head"], "layer") == "net.0, head"
    assert some(["0", "1", "2"], "layer") == "3 layers"
