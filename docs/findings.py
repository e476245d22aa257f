"""Write docs/findings.md: the page of every code, from the catalog.

Run it from the repository's root: `python -m docs.findings`.
"""

from __future__ import annotations

from pathlib import Path

from curvscope.diagnose.catalog import CATALOG

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Findings

The page of every code, as `curvscope explain CODE` prints it; written by `python -m docs.findings` from the catalog. The
signs that most of them rest on are in [signs.md](signs.md), the verdict on stability in [stability.md](stability.md).

**Severity.** An error or a warning says that training is in danger, or that K-FAC or Shampoo, where they are in use, rest
on a bad approximation. Everything else is info: a network can live with it. A cause is as severe as the worst of what it
causes; so an oddity that does no harm stays info.

**Order.** Likely root causes come first, in order of severity, then of how specific they are, then of confidence; what
follows from one stands behind it and names it in `caused_by`. The table of causes is `curvscope/diagnose/causes.py`.

**Confidence.** 1 for what is counted or exact. For a sign with a threshold 0.5 at the threshold and 0.2 more for every
factor of 2 beyond it, at most 0.95. Verdicts on sharpness have 0.9 (above), 0.6 (near) and 0.4 (early steps of Adam).
It says how clear the evidence is, not how often the finding proved right.

"""


def document() -> str:
    """The whole page."""
    table = ["| code | what it stands for | severity |", "| --- | --- | --- |"]
    table += [
        f"| [{one.code}](#{one.code.lower()}) | {one.title} | {one.severity} |" for _, one in sorted(CATALOG.items())
    ]
    pages = [
        f"## {one.code}\n\n**{one.title[:1].upper()}{one.title[1:]}.** {one.what}\n\n"
        f"- *Why it matters.* {one.why}\n- *Threshold.* {one.threshold}\n- *How to fix.* {one.fix}\n"
        f"- *Example.* {one.example}\n- *Source.* {one.source}\n"
        for _, one in sorted(CATALOG.items())
    ]
    return HEAD + "\n".join([*table, "", *pages])


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")
