"""What a code's page says; `curvscope explain` prints it, docs/findings.md holds them all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One code's page.

    Attributes:
        code: CS and three digits; never given to anything else.
        title: a few words.
        severity: what it is on its own, and what changes that.
        what: what was found.
        why: why it matters.
        threshold: from where on, and where that comes from.
        source: the literature.
        fix: what to do.
        example: what it looks like.
    """

    code: str
    title: str
    severity: str
    what: str
    why: str
    threshold: str
    source: str
    fix: str
    example: str
