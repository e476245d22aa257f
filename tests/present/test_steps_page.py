"""The steps of the whole network in the terminal, on the first page and on their own."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from curvscope.cli.app import app
from curvscope.present.terminal import render
from curvscope.records import NAN, Run
from tests.synthetic import FORBIDDEN, make_run


def shown(run: Run, width: int = 100, **options: bool) -> str:
    file = io.StringIO()
    render(run, Console(file=file, width=width, force_terminal=False, color_system=None), **options)
    return file.getvalue()


def section(text: str) -> str:
    return text.partition("one damped step of all layers")[2].partition("what deserves a look")[0]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_first_page_has_the_better_kfac_and_a_line_for_the_others(width: int) -> None:
    text = section(shown(make_run(), width))
    assert all(len(line) <= width for line in text.splitlines())
    words = " ".join(text.split())
    # the lowest change of the four K-FACs in eigenbasis form is kfac_reduce's
    assert "K-FAC-reduce: recommended damping 10.0 for all layers, -0.0320 by one full step" in words
    assert "Safe from 10.0 on (a decrease predicted, rho at least 1/4)" in words
    assert "The optimizer's own damping is 0.100: +0.00400 by the full step." in words
    assert "its own best times 10.0 (set): -0.0400, 25% more than one for all." in words
    assert "K-FAC-expand 10.0 (-0.0300)" in words
    assert "EKFAC-expand 10.0" in words
    assert "0.00280 (K-FAC-expand, EKFAC-reduce)" in words
    assert "lowest loss" in text
    assert "the optimizer's" in text


def test_values_by_layer_that_do_no_better_are_told_with_what_they_lose() -> None:
    run = make_run()
    run.tables["global_damping"] = [
        dataclasses.replace(row, per_layer_change=-0.021, per_layer_gain=-0.34) for row in run.tables["global_damping"]
    ]
    words = " ".join(section(shown(run)).split())
    assert "its own best times 10.0: -0.0210, 34% less than one for all: set one value for all." in words
    assert "(set)" not in words


def test_a_recommended_value_that_is_not_safe_says_so_beside_it_everywhere() -> None:
    run = make_run()
    run.tables["global_damping"] = [
        dataclasses.replace(row, rho=-0.6, safe_from=100.0, safe_damping=100.0) for row in run.tables["global_damping"]
    ]
    text = section(shown(run))
    words = " ".join(text.split())
    assert "K-FAC-reduce: recommended damping 10.0 (not safe, rho -0.600) for all layers" in words
    assert "lowest there at 100 (-0.0320), the one for many steps" in words
    assert "other curvature (with rho where that is not safe): K-FAC-expand 10.0 (-0.0300, rho -0.600)" in words
    assert [line for line in text.splitlines() if "recommended, not safe" in line]
    # a value of which that is not known is not called safe, either
    run.tables["global_damping"] = [dataclasses.replace(row, rho=NAN) for row in run.tables["global_damping"]]
    assert "damping 10.0 (rho within rounding)" in " ".join(section(shown(run)).split())


def test_steps_by_drawn_factors_say_so_on_the_first_page() -> None:
    run = make_run()
    run.tables["global_damping"] = [
        dataclasses.replace(row, status="estimated") for row in run.tables["global_damping"][:4]
    ]
    assert "how far those of other draws would differ is not assessed." in " ".join(section(shown(run)).split())
    assert "how far those of other draws" not in " ".join(section(shown(make_run())).split())


def test_a_run_without_steps_says_why_once() -> None:
    run = make_run()
    for table in ("steps", "global_damping"):
        run.tables[table] = [
            dataclasses.replace(row, status="not_assessed", reason=FORBIDDEN) for row in run.tables[table]
        ]
    text = section(shown(run))
    assert text.count("not assessed") == 1
    assert "it with --fisher probe" in " ".join(text.split())


def test_a_run_without_the_tables_has_no_section() -> None:
    run = make_run()
    for table in ("steps", "global_damping", "evidence"):
        run.tables[table] = []
    assert "one damped step" not in shown(run)


def test_no_safe_damping_and_no_decrease_are_words() -> None:
    run = make_run()
    run.tables["global_damping"] = [
        dataclasses.replace(row, damping=NAN, safe_from=NAN, change=NAN, safe_damping=NAN)
        for row in run.tables["global_damping"][:1]
    ]
    words = " ".join(section(shown(run)).split())
    assert "No damping that was tried lowers the loss" in words
    assert "No damping that was tried is safe" in words
    assert "nan" not in words


def test_the_page_of_steps_has_every_series_and_the_evidence(tmp_path: Path) -> None:
    make_run().save(tmp_path / "run.h5")
    result = CliRunner().invoke(app, ["show", str(tmp_path / "run.h5"), "--steps"])
    assert result.exit_code == 0, result.output
    for heading in (
        "K-FAC-expand, eigenbasis damping",
        "K-FAC-reduce, factored damping",
        "exact blocks, eigenbasis damping",
        "Laplace log evidence",
    ):
        assert heading in result.output
    assert "70 passes" in result.output
    assert "3 terms an example" in result.output
    assert "within rounding" in result.output
