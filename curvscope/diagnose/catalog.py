"""Every code with its page."""

from __future__ import annotations

import difflib

from curvscope.diagnose.page import Entry
from curvscope.diagnose.pages import approximation, coverage, damping, signals, stability
from curvscope.errors import UsageError

CATALOG: dict[str, Entry] = {
    entry.code: entry for family in (approximation, signals, coverage, damping, stability) for entry in family.ENTRIES
}


def entry(code: str) -> Entry:
    """The page of a code; upper and lower case are the same, and "101" is CS101.

    Raises:
        UsageError: there is no such code; the near ones are named.
    """
    wanted = code.strip().upper()
    wanted = f"CS{wanted}" if wanted.isdigit() else wanted
    if wanted in CATALOG:
        return CATALOG[wanted]
    near = difflib.get_close_matches(wanted, CATALOG, n=4, cutoff=0.5)
    near = sorted(near) or [one.code for one in CATALOG.values() if code.lower() in one.title]
    raise UsageError(
        f"There is no code {code!r}.",
        where="curvscope explain",
        remedy=(f"Did you mean {' or '.join(near)}? " if near else "") + "curvscope explain alone lists all.",
    )


__all__ = ["CATALOG", "Entry", "entry"]
