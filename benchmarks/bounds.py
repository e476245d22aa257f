"""Peak memory of the whole default analysis at several bounds, as a page of its own.

`python -m benchmarks.bounds [WORKLOAD ...]` writes results/<date>-<device>-memory.md and .json;
`memory.py` says what is measured.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import memory, report
from benchmarks.workloads import WORKLOADS

MEBIBYTE = 2**20


def markdown(document: report.Document) -> str:
    """The page."""
    facts = document["about"]
    return "\n\n".join(
        [
            f"# Peak memory, {facts['date']}, {facts['device']}",
            f"Python {facts['python']}, torch {facts['versions']['torch']}, one thread. {facts['note']}".strip(),
            "MiB, in three processes. Base: everything imported, a small model analyzed, the workload made. Own: what "
            "one training step adds. Analysis: what the analysis adds at its peak; it is within where that is at most "
            "bound + own. Planned: the peak that `--dry-run` prints. Not assessed: layers whose columns the bound "
            "leaves no room for. Refused: the bound is below what the factors of all layers take, and the error names "
            "the least. gpt's layers are estimated from 8 probes.",
            report.memory_table(document["memory"]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS))
    parser.add_argument("--memory", type=int, nargs="*", default=[256, 512, 2048], metavar="MiB")
    parser.add_argument("--note", default="")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    peaks = []
    for name in options.workloads:
        for bound in options.memory:
            peaks.append(memory.measure(name, bound * MEBIBYTE, "cpu", threads=1))
            print(peaks[-1], file=sys.stderr, flush=True)
    document = {"about": report.about("cpu", options.note), "memory": peaks}
    text = markdown(document)
    print(text)
    if not options.dry_run:
        report.write(document, text, "memory")


if __name__ == "__main__":
    main()
