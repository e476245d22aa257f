"""Peak memory against the number of batches, as a page of its own.

`python -m benchmarks.batches [COUNT ...]` writes results/<date>-<device>-batches.md and .json. Every number of batches
is analyzed in a process of its own, which makes each batch when it is asked for and holds none; the peak is the
resident memory beyond that of a process that analyzes one example.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks import memory, report

MEBIBYTE = 2**20
WIDTHS = (48, 24, 24, 10)
EXAMPLES = 128
BOUND = 256 * MEBIBYTE


def peak(count: int, fisher: str) -> dict[str, Any]:
    """The peak of a process that analyzes so many batches, beyond the base, in bytes, and what it could not assess."""
    base, found = _process(0, fisher), _process(count, fisher)
    return {**found, "batches": count, "fisher": fisher, "base": base["peak"], "peak": found["peak"] - base["peak"]}


def markdown(document: report.Document) -> str:
    """The page."""
    facts, rows = document["about"], document["batches"]
    lines = ["| columns | batches | examples | peak, MiB | not assessed |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        lines.append(
            f"| {row['fisher']} | {row['batches']} | {row['batches'] * EXAMPLES} | {row['peak'] / MEBIBYTE:.0f} "
            f"| {row['not_assessed']} of {row['layers']} |"
        )
    return "\n\n".join(
        [
            f"# Peak memory against the number of batches, {facts['date']}, {facts['device']}",
            f"Python {facts['python']}, torch {facts['versions']['torch']}, one thread. {facts['note']}".strip(),
            f"An MLP {'-'.join(map(str, WIDTHS))}, batches of {EXAMPLES}, --memory {BOUND // MEBIBYTE} MiB. Peak: "
            "resident memory beyond that of a process that analyzes one example "
            f"(about {rows[0]['base'] / MEBIBYTE:.0f} MiB).",
            "\n".join(lines),
        ]
    )


def _process(count: int, fisher: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.batches", "--one", str(count), "--fisher", fisher]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _analyzed(count: int, fisher: str) -> dict[str, int]:
    import torch
    from torch import nn

    import curvscope

    torch.manual_seed(0)
    layers = [module for pair in itertools.pairwise(WIDTHS) for module in (nn.Linear(*pair), nn.Tanh())]
    examples = EXAMPLES if count else 1

    def batches() -> Iterator[Any]:
        for number in range(max(1, count)):
            generator = torch.Generator().manual_seed(number)
            inputs = torch.randn(examples, WIDTHS[0], generator=generator)
            yield inputs, torch.randint(WIDTHS[-1], (examples,), generator=generator)

    model = nn.Sequential(*layers[:-1])
    run = curvscope.analyze(model, batches, loss="cross_entropy", fisher=fisher, memory=BOUND, time=5.0)
    missing = sum(layer.row.status == "not_assessed" for layer in run.layers.values())
    return {"peak": memory.peak_bytes("cpu"), "layers": len(run.layers), "not_assessed": missing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counts", nargs="*", type=int, default=[2, 8, 32])
    parser.add_argument("--note", default="")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fisher", default="", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(_analyzed(options.one, options.fisher)))
        return
    rows = []
    for fisher in ("exact", "probe"):
        for count in options.counts:
            rows.append(peak(count, fisher))
            print(rows[-1], file=sys.stderr, flush=True)
    document = {"about": report.about("cpu", options.note), "batches": rows}
    text = markdown(document)
    print(text)
    if not options.dry_run:
        report.write(document, text, "batches")


if __name__ == "__main__":
    main()
