"""Words for quantities: "8GiB" as bytes."""

from __future__ import annotations

import re

from curvscope.errors import UsageError

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([KMGT]?)(I?)(B?)\s*", re.IGNORECASE)


def parse_bytes(words: str) -> int:
    """Bytes that "8GiB", "500 MB", "8G" (binary, as it is meant) or "1073741824" stand for.

    Raises:
        UsageError: anything else, or not positive.
    """
    match = _QUANTITY.fullmatch(words)
    size = float(match[1]) if match else 0.0
    if match is None or size <= 0:
        raise UsageError(
            f"{words!r} is no amount of memory.",
            where="memory (--memory)",
            remedy="Write 8GiB, 500MB or bytes.",
        )
    prefix, binary, unit = match[2].upper(), bool(match[3]), bool(match[4])
    base = 1000 if prefix and unit and not binary else 1024
    return int(size * base ** _POWERS[prefix])
