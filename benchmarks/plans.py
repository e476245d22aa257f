"""What `--dry-run` promises against what the analysis takes: seconds, workload by workload.

`python -m benchmarks.plans [WORKLOAD ...]` prints one line each: estimated and real seconds of passes and measures, and
the ratio real / estimated. Both are of one process, the plan first.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.workloads import WORKLOADS, make


def compare(name: str, memory: int | None = None) -> dict[str, Any]:
    """Estimated and real seconds of one workload, and real / estimated."""
    from curvscope import pipeline

    workload = make(name)
    options: dict[str, Any] = {"loss": "cross_entropy", "memory": memory}
    planned = pipeline.plan(workload.model, (workload.inputs, workload.targets), **options)
    seconds = pipeline.analyze(workload.model, (workload.inputs, workload.targets), **options).seconds
    real = seconds["passes"] + seconds["measure"]
    return {
        "workload": name,
        "fisher": planned.fisher,
        "estimated": planned.seconds,
        "real": {"passes": seconds["passes"], "measure": seconds["measure"]},
        "ratio": real / planned.total_seconds,
    }


def main() -> None:
    for name in sys.argv[1:] or WORKLOADS:
        found = compare(name)
        pairs = {part: (found["estimated"][part], real) for part, real in found["real"].items()}
        parts = [f"{part} {estimated:.2f} s, really {real:.2f} s" for part, (estimated, real) in pairs.items()]
        print(f"{name} ({found['fisher']}): {'; '.join(parts)}; real / estimated {found['ratio']:.2f}", flush=True)


if __name__ == "__main__":
    main()
