from __future__ import annotations

import pytest
import typer

from curvscope.cli.quantities import example_axis, memory_bytes, one_of, seconds


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("8G", 8 * 2**30),
        ("500 MB", 500 * 10**6),
        ("1.5gib", 3 * 2**29),
        (".5TiB", 2**39),
        ("1048576", 2**20),
        ("10B", 10),
    ],
)
def test_memory(words: str, size: int) -> None:
    assert memory_bytes(words) == size


@pytest.mark.parametrize(
    ("words", "time"),
    [("60s", 60.0), ("90", 90.0), ("2min", 120.0), ("1.5h", 5400.0), ("500ms", 0.5), ("0", 0.0)],
)
def test_seconds(words: str, time: float) -> None:
    assert seconds(words) == time


@pytest.mark.parametrize(("words", "axis"), [("x=1", ("x", 1)), ("0=-1", ("0", -1)), ("a=b=2", ("a=b", 2))])
def test_example_axis(words: str, axis: tuple[str, int]) -> None:
    assert example_axis(words) == axis


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (memory_bytes, "eight"),
        (memory_bytes, "-1GiB"),
        (memory_bytes, "8GiBs"),
        (memory_bytes, ""),
        (seconds, "1y"),
        (seconds, "-5s"),
        (seconds, "nan"),
        (example_axis, "x"),
        (example_axis, "=1"),
        (example_axis, "x=one"),
        (one_of(("a", "b")), "c"),
    ],
)
def test_refused(parse: object, words: str) -> None:
    assert callable(parse)
    with pytest.raises(typer.BadParameter):
        parse(words)
