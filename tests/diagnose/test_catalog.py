"""Every code has a page, and the pages stand in docs/findings.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from curvscope.diagnose.catalog import CATALOG, entry
from curvscope.errors import UsageError

ROOT = Path(__file__).parents[2]


def test_every_code_that_a_rule_uses_has_a_page() -> None:
    used = set()
    for file in (ROOT / "curvscope" / "diagnose").glob("*.py"):
        used |= set(re.findall(r'(?:finding|found|_simple)\(\s*(?:rows,\s*"\w+",\s*)?"(CS\d{3})"', file.read_text()))
    assert len(used) > 20
    assert used == set(CATALOG)


@pytest.mark.parametrize("code", sorted(CATALOG))
def test_pages_are_complete(code: str) -> None:
    page = CATALOG[code]
    assert page.code == code
    assert all(getattr(page, name).strip() for name in page.__dataclass_fields__)
    assert page.what.endswith(".")
    assert page.fix.endswith(".")


@pytest.mark.parametrize("words", ["CS501", "cs501", " 501 "])
def test_a_code_is_found(words: str) -> None:
    assert entry(words).code == "CS501"


@pytest.mark.parametrize(("words", "near"), [("CS519", "CS509"), ("curvature", "CS201"), ("XYZ", "")])
def test_unknown_codes_name_near_ones(words: str, near: str) -> None:
    with pytest.raises(UsageError) as raised:
        entry(words)
    assert near in raised.value.remedy
    assert ("Did you mean" in raised.value.remedy) == bool(near)
    assert "curvscope explain alone lists all" in raised.value.remedy


def test_the_page_in_the_docs_is_the_catalog() -> None:
    from docs.findings import document

    assert (ROOT / "docs" / "findings.md").read_text(encoding="utf-8") == document()
