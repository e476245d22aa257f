"""Words on the command line that stand for quantities: 8GiB, 60s, NAME=1, and one of several names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import typer

from curvscope.errors import UsageError
from curvscope.units import parse_bytes

SECONDS = {"": 1.0, "ms": 1e-3, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")


def memory_bytes(words: str) -> int:
    """Bytes that "8GiB", "500 MB" or "1073741824" stand for."""
    try:
        return parse_bytes(words)
    except UsageError as error:
        raise typer.BadParameter(f"{error.what} {error.remedy}") from error


def seconds(words: str) -> float:
    """Seconds that "60s", "2min", "1h" or "90" stand for."""
    match = QUANTITY.fullmatch(words)
    if match is None or match[2].lower() not in SECONDS:
        raise typer.BadParameter(f"{words!r} is no duration; write 60s, 2min or a number of seconds.")
    return float(match[1]) * SECONDS[match[2].lower()]


def example_axis(words: str) -> tuple[str, int]:
    """Name and axis of "NAME=1"."""
    name, equals, axis = words.rpartition("=")
    if not (equals and name and axis.strip().lstrip("-").isdigit()):
        raise typer.BadParameter(f"{words!r} names no axis; write NAME=1, with an input's name or position.")
    return name.strip(), int(axis)


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """A parser that takes one of the names and lists them otherwise."""

    def parse(words: str) -> str:
        if words not in names:
            raise typer.BadParameter(f"{words!r} is not one of {', '.join(names)}.")
        return words

    return parse
