"""`python -m benchmarks` (`make bench`): times every workload and writes results/<date>-<device>.md and .json."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from benchmarks import memory, report
from benchmarks.workloads import WORKLOADS

MEBIBYTE = 2**20
ANALYZED = ("vit",)
BOUNDED = ("mlp", "resnet", "vit")


def main() -> None:
    options = _options()
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    for threads in options.threads:
        for name in options.workloads:
            print(f"{name}, {threads} threads ...", file=sys.stderr, flush=True)
            try:
                results.append(_rounds(name, threads, options))
            except subprocess.CalledProcessError:
                failed.append(f"{name} at {threads} threads")
    peaks = [
        memory.measure(name, bound * MEBIBYTE, options.device, threads=1)
        for name in BOUNDED
        if name in options.workloads
        for bound in options.memory
    ]
    document = {"about": report.about(options.device, options.note), "results": results, "memory": peaks}
    text = report.markdown(document)
    print(text)
    if failed:
        sys.exit(f"failed, so nothing was written: {', '.join(failed)}")
    if not options.dry_run:
        for path in report.write(document, text):
            print(f"written: {path}", file=sys.stderr)


def _rounds(name: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """One workload in a process of its own, whose thread pools have that many threads from the start."""
    command = [sys.executable, "-m", "benchmarks.rounds", name, "--threads", str(threads)]
    command += ["--repeats", str(options.repeats), "--device", options.device]
    command += ["--analysis"] * (name in ANALYZED and not options.no_analysis)
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = os.environ | dict.fromkeys(pools, str(threads))
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), metavar="WORKLOAD", help="default: all")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1], help="thread counts (default: 2 1)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of each workload (default: 9)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--memory", type=int, nargs="*", default=[256, 512, 2048], metavar="MiB", help="bounds of the memory part"
    )
    parser.add_argument("--no-analysis", action="store_true", help="leave out the whole default analysis")
    parser.add_argument("--note", default="", help="a remark for the head of the page, e.g. what else was running")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    unknown = sorted(set(options.workloads) - set(WORKLOADS))
    if unknown:
        parser.error(f"no workload named {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    return options


if __name__ == "__main__":
    main()
