from __future__ import annotations

import math

import numpy as np
import pytest

from curvscope.present.names import decode, encode, shorten
from curvscope.present.numbers import count, number, percent, with_stderr
from curvscope.present.sparkline import picture, sparkline


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0.0, "0"),
        (0.41234, "0.412"),
        (0.99996, "1.00"),
        (9.9951, "10.0"),
        (35.21, "35.2"),
        (3519.6, "3,520"),
        (99_999.0, "1.0e5"),
        (0.00123, "0.00123"),
        (0.0009996, "0.00100"),
        (4.14e-7, "4.1e-7"),
        (-2.5e-12, "-2.5e-12"),
        (1e300, "1.0e300"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_number(value: float, words: str) -> None:
    assert number(value) == words


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.99999, "99.9 %"), (0.0001, "<0.1 %"), (0.4567, "45.7 %")],
)
def test_percent(share: float, words: str) -> None:
    assert percent(share) == words


def test_count() -> None:
    assert [count(n, "layer") for n in (0, 1, 1200)] == ["0 layers", "1 layer", "1,200 layers"]


@pytest.mark.parametrize("name", ["a.b", "a/b", "100%", "%2F", "%252F/", ".", "..", "a.%2E", "ü/é"])
def test_names_survive_a_path(name: str) -> None:
    assert "/" not in encode(name)
    assert encode(name) != "."
    assert decode(encode(name)) == name


@pytest.mark.parametrize(
    ("name", "width", "short"),
    [
        ("head", 10, "head"),
        ("transformer.h.0.attn.c_attn", 27, "transformer.h.0.attn.c_attn"),
        ("transformer.h.0.attn.c_attn", 22, "transf…h.0.attn.c_attn"),
        ("transformer.h.0.attn.c_attn", 18, "tr…h.0.attn.c_attn"),
        ("model.layers.11.self_attn.q_proj", 20, "…11.self_attn.q_proj"),
        ("model.layers.11.self_attn.q_proj", 16, "…11.self_…q_proj"),
        ("averyveryverylongname", 10, "ave…ngname"),
    ],
)
def test_shortened_names_keep_what_tells_them_apart(name: str, width: int, short: str) -> None:
    (result,) = shorten([name], width)
    assert len(result) <= width
    assert result == short


@pytest.mark.parametrize("width", [4, 8, 12, 20, 30])
def test_shortened_names_stay_different(width: int) -> None:
    names = [
        f"{stack}.layers.{i}.{part}.{layer}_projection"
        for stack in ("encoder", "decoder")
        for i in range(12)
        for part in ("self_attention", "cross_attention")
        for layer in ("query", "key")
    ]
    short = shorten(names, width)
    assert max(map(len, short)) <= width
    assert len(set(short)) == len(names)


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        pytest.param([], 8, "", id="no curvature"),
        pytest.param([0.0, 0.0], 8, "", id="zero"),
        pytest.param([3.0], 8, "█", id="one"),
        pytest.param([10.0**-i for i in range(8)], 8, "█▇▆▅▄▃▂▁", id="a decade a step"),
        pytest.param([1.0, 1e-30, 0.0], 8, "█▁▁", id="below the scale"),
        pytest.param([2.0] * 100, 5, "█████", id="flat"),
        pytest.param([1.0] * 99 + [1e-7], 5, "████▁", id="the smallest stands last"),
    ],
)
def test_sparkline(values: list[float], width: int, line: str) -> None:
    assert sparkline(np.array(values), width) == line
    plain = sparkline(np.array(values), width, ascii_only=True)
    assert len(plain) == len(line)
    assert plain.isascii()


def test_picture_has_whole_decades_on_its_axis() -> None:
    drawn = picture(10.0 ** -np.linspace(0, 4, 40), width=20, height=8)
    assert [label for label, _ in drawn.rows] == ["1e0", "", "1e-1", "", "1e-2", "", "1e-3", ""]
    assert drawn.rows[-1][1].startswith("█" * 17)
    assert drawn.rows[0][1].rstrip() == drawn.rows[0][1].rstrip()[:4]
    assert drawn.axis == "1" + "40".rjust(19)


@pytest.mark.parametrize(
    ("values", "other", "rows"),
    [
        pytest.param([1.0], None, 4, id="one eigenvalue"),
        pytest.param([1.0], [1e-9, 1e-12], 4, id="far below"),
        pytest.param([1e-200, 1e-300], [1e200], 4, id="enormous range"),
        pytest.param([0.0], None, 0, id="nothing to draw"),
        pytest.param([1.0, 0.5, 0.1], [2.0], 4, id="fewer of the other"),
    ],
)
def test_picture_of_odd_spectra(values: list[float], other: list[float] | None, rows: int) -> None:
    drawn = picture(np.array(values), None if other is None else np.array(other), width=10, height=4)
    assert len(drawn.rows) == rows
    if other is not None:
        assert any("•" in cells for _, cells in drawn.rows)


@pytest.mark.parametrize(
    ("value", "stderr", "words"),
    [
        (0.919, 0.0432, "0.92±.04"),
        (0.919, 0.0062, "0.919±.006"),
        (3.04, 0.096, "3.0±.1"),
        (1230.4, 41.0, "1,230±40"),
        (1.23e-5, 3e-6, "1.2e-5±3e-6"),
        (123456.0, 300.0, "1.235e5±300"),
        (0.97314, 1.7e-5, "0.9731±2e-5"),
        (0.0012, 0.03, "0.00±.03"),
        (0.0, 0.04, "0.00±.04"),
        (-0.3, 0.04, "-0.30±.04"),
        (35.2, 123.0, "0±100"),
        (1.0, 0.0, "1.00"),
        (math.inf, 1.0, "inf±1"),
    ],
)
def test_a_number_ends_where_its_error_begins(value: float, stderr: float, words: str) -> None:
    assert with_stderr(value, stderr) == words
