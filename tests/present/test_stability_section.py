from __future__ import annotations

import dataclasses

import pytest

from curvscope.present import json
from curvscope.records import NAN, StabilityRow
from tests.present.test_terminal import page
from tests.synthetic import make_run


def test_the_section_tells_optimizer_verdict_growth_and_layers() -> None:
    text = page(make_run(), width=140)
    section = text[text.index("stability ─") : text.index("parameters without")]
    for words in (
        "Adam, lr 0.003",
        "52.1 (50.0 to 60.2) Hessian, 48.3 GGN",
        "above: 21,000 (18,100 to 26,000) against 12,700",
        "on 6 examples and halves of them",
        "2.90 times a step along the top direction; stable up to a learning rate of 0.00180 (0.00150 to 0.00210)",
    ):
        assert words in " ".join(section.split()), words
    lines = [line.split() for line in section.splitlines() if "%" in line]
    assert lines[0] == ["stem.conv", "50.0", "%", "16,000", "(14,000", "to", "17,000)", "above"]
    assert len(lines) == 4  # 50, 25, 12.5, 6.25 %


def test_not_assessed_is_said_with_the_reason() -> None:
    run = make_run()
    run.tables["stability"] = [
        StabilityRow("network", "", "hessian_top", 5.0, status="not_converged", reason="time"),
        StabilityRow("network", "", "preconditioned_sharpness", status="not_assessed", reason="no state was saved"),
    ]
    run.model = dataclasses.replace(run.model, optimizer="")
    text = " ".join(page(run).split())
    assert "optimizer not known" in text
    assert "verdict not assessed: no state was saved" in text
    assert "5.00 at least Hessian" in text


def test_a_run_without_stability_has_no_section() -> None:
    run = make_run()
    run.tables["stability"] = []
    assert "stability ─" not in page(run)
    assert "stability ─" not in page(run, "head")


def test_the_layers_page_has_its_rows() -> None:
    text = " ".join(page(make_run(), "stem.conv").split())
    assert "share of the top direction 50.0 %" in text
    assert "sharpness as the optimizer sees it 16,000 (14,000 to 17,000), threshold 12,700: above" in text


@pytest.mark.parametrize("value", [NAN, 3.5])
def test_json_has_the_table(value: float) -> None:
    run = make_run()
    run.tables["stability"] = [StabilityRow("network", "", "ggn_top", value)]
    (row,) = json.document(run)["tables"]["stability"]
    assert row["value"] == (3.5 if value == 3.5 else None)
    assert row["verdict"] == "not_assessed"


def test_one_example_is_no_examples() -> None:
    run = make_run()
    run.model = dataclasses.replace(run.model, examples=1)
    text = " ".join(page(run, width=140).split())
    assert "on 1 example and halves" in text and "1 examples" not in text
