"""Numbers in few characters."""

from __future__ import annotations

import math


def number(value: float, digits: int = 3) -> str:
    """The value to `digits` significant digits, e.g. 0.412, 35.2, 3,520, 4.1e-7; "nan" and "inf" as such."""
    if math.isnan(value) or math.isinf(value):
        return str(value)
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = math.floor(math.log10(abs(rounded)))
    if -3 <= exponent < 5:
        return f"{rounded:,.{max(0, digits - 1 - exponent)}f}"
    mantissa, power = f"{value:.{max(0, digits - 2)}e}".split("e")
    return f"{mantissa}e{int(power)}"


def with_stderr(value: float, stderr: float, sign: str = "±") -> str:
    """A value to the place of its standard error's first digit, and that error, e.g. 0.92±.04, 1,230±40, 1.2e-5±3e-6.

    The value has at most 4 digits where its error is far smaller; `number` stands for both where one is not finite, and
    for the value alone where its error is 0.
    """
    if stderr == 0:
        return number(value)
    if not (math.isfinite(value) and math.isfinite(stderr)):
        return f"{number(value)}{sign}{number(stderr, 1)}"
    error = number(stderr, 1)
    place = math.floor(math.log10(float(f"{stderr:.0e}")))
    size = math.floor(math.log10(abs(value))) if value else place
    if not -3 <= size < 5 and abs(value) > stderr:
        mantissa, power = f"{value:.{min(3, max(0, size - place))}e}".split("e")
        return f"{mantissa}e{int(power)}{sign}{error}"
    decimals = max(0, -place) if size - place < 4 else max(0, 3 - size)
    rounded = round(value, -place) if place > 0 and size - place < 4 else value
    if error.startswith("0."):
        error = error[1:]
    return f"{rounded:,.{min(decimals, 6)}f}{sign}{error}"


def percent(share: float) -> str:
    """A share as a percentage; 100 % and 0 % only where they are exact."""
    if math.isnan(share):
        return "nan"
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", " %")
    value = min(max(100 * share, 0.0), 100.0)
    if value < 0.1:
        return "<0.1 %"
    return f"{min(value, 99.9):.1f} %"


def count(value: int, noun: str, plural: str = "") -> str:
    """A number with its noun, e.g. "1 layer" or "1,200 layers"."""
    return f"{value:,} {noun if value == 1 else plural or noun + 's'}"


def whole_percent(share: float) -> str:
    """A share to whole percents, which may be negative or over 100 %; never "-0%"."""
    return f"{round(100 * share) + 0:d}%"
