"""docs/signs.md has every sign with the threshold, the origin and the finding that the code gives it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from curvscope.diagnose.catalog import CATALOG
from curvscope.measure.signs import SIGNS
from curvscope.present.terminal.stability import QUANTITY_WORDS
from docs.zoo_fit import GRIDS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "signs.md").read_text(encoding="utf-8")
ROWS = {
    name: [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]
    for line in PAGE.splitlines()
    if line.startswith("| `")
    for name in re.findall(r"`(\w+)`", line.split(" | ")[0])
}


def test_the_page_has_the_signs() -> None:
    assert set(ROWS) == set(SIGNS)
    assert set(SIGNS) <= set(QUANTITY_WORDS)


@pytest.mark.parametrize("name", SIGNS)
def test_a_signs_row(name: str) -> None:
    formula, threshold, origin, told = ROWS[name]
    assert formula
    written = {"24 log 2": 24 * math.log(2), "none": math.nan, "N·`gradient_signal`": math.nan}.get(threshold)
    expected = SIGNS[name].threshold
    found = float(threshold) if written is None else written
    assert found == pytest.approx(expected, nan_ok=True)
    assert origin.startswith("fitted") == (name in GRIDS)
    assert origin.startswith(("fitted", "choice", "theory", "definition", "compare"))
    sources = re.findall(r"arXiv:\d+\.\d+", SIGNS[name].source)
    assert all(source in origin or source in PAGE.split(f"`{name}`", 1)[1] for source in sources)
    codes = re.findall(r"CS\d{3}", told)
    assert all(code in CATALOG for code in codes)
    assert codes or told.startswith("none")
