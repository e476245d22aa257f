"""What `--dry-run` promises against what the analysis takes: seconds and bytes, benchmarks and samples.

`python -m benchmarks.plans [NAME ...]` writes results/<date>-<device>-plans.md and .json. Each name has two processes
of one thread, one after the other: one plans, then analyzes; one only analyzes, for its peak. Seconds are the process's
own (CPU time), so that other programs on the machine do not matter; of the stages the plan foresees (passes, measures,
steps, stability). Bytes are resident, less those before the analysis.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import memory, report
from benchmarks.workloads import WORKLOADS, make

SAMPLES = Path(__file__).parent.parent / "sample_models"
STAGES = ("passes", "measure", "steps", "stability")
MEBIBYTE = 2**20


def _arguments(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """Model, batch and options of a benchmark's workload or of a sample."""
    if name in WORKLOADS:
        workload = make(name)
        return workload.model, (workload.inputs, workload.targets), {"loss": "cross_entropy"}
    return SAMPLES / f"{name}.pt", None, {}


def compare(name: str, memory_bytes: int | None = None) -> dict[str, Any]:
    """Estimated and real seconds of one analysis, real / estimated, and the bytes that were planned."""
    from curvscope import pipeline

    time.perf_counter = time.process_time  # type: ignore[assignment]
    model, batch, options = _arguments(name)
    options["memory"] = memory_bytes
    planned = pipeline.plan(model, batch, **options)
    seconds = pipeline.analyze(model, batch, **options).seconds
    real = {stage: seconds.get(stage, 0.0) for stage in STAGES}
    return {
        "name": name,
        "fisher": planned.fisher,
        "estimated": planned.seconds,
        "real": real,
        "ratio": sum(real.values()) / planned.total_seconds,
        "planned_bytes": planned.peak_bytes,
    }


def peak(name: str, memory_bytes: int | None = None) -> int:
    """Bytes that the analysis alone adds to the process at its peak."""
    import torch
    from torch import nn

    import curvscope

    curvscope.analyze(
        nn.Sequential(nn.Linear(3, 2)), (torch.randn(4, 3), torch.zeros(4, dtype=torch.long)), loss="cross_entropy"
    )
    model, batch, options = _arguments(name)
    before = memory.peak_bytes("cpu")
    curvscope.analyze(model, batch, memory=memory_bytes, **options)
    return memory.peak_bytes("cpu") - before


def _run(part: str, name: str, bound: int | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.plans", name, "--part", part]
    command += [] if bound is None else ["--bytes", str(bound)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def markdown(document: dict[str, Any]) -> str:
    """The page."""

    def row(found: dict[str, Any]) -> list[str]:
        pairs = [f"{found['estimated'].get(stage, 0.0):.2f} / {found['real'][stage]:.2f}" for stage in STAGES]
        sizes = [f"{found[key] / MEBIBYTE:.0f}" for key in ("planned_bytes", "peak_bytes")]
        return [found["name"], found["fisher"], *pairs, f"{found['ratio']:.2f}", *sizes]

    facts = document["about"]
    head = ["name", "fisher", *(f"{stage}, s" for stage in STAGES), "real / planned", "planned MiB", "peak MiB"]
    return "\n\n".join(
        [
            f"# Plans, {facts['date']}, {facts['device']}",
            f"Python {facts['python']}, torch {facts['versions']['torch']}, one thread, {facts['note'] or 'one run'}. "
            "Seconds of the process (CPU time), planned / real, by stage; the ratio is of all stages. The planned "
            "bytes are the peak without model, data and libraries; bound "
            f"{document['bound'] or 'half of what is free'}.",
            report.table(head, [row(found) for found in document["results"]]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--bytes", type=int, default=None, help="--memory of the analyses")
    parser.add_argument("--part", choices=("seconds", "peak"))
    parser.add_argument("--note", default="")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    if options.part:
        (name,) = options.names
        found = compare(name, options.bytes) if options.part == "seconds" else {"peak_bytes": peak(name, options.bytes)}
        print(json.dumps(found))
        return
    results = []
    for name in options.names or [*WORKLOADS, *sorted(path.stem for path in SAMPLES.glob("*.pt"))]:
        results.append({**_run("seconds", name, options.bytes), **_run("peak", name, options.bytes)})
        print(f"{name}: real / planned {results[-1]['ratio']:.2f}", file=sys.stderr, flush=True)
    document = {"about": report.about("cpu", options.note), "bound": options.bytes, "results": results}
    text = markdown(document)
    print(text)
    if not options.dry_run:
        report.write(document, text, "plans")


if __name__ == "__main__":
    main()
