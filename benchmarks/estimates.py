"""Exact columns against probes: seconds, and every estimate's error in units of its own standard error.

`python -m benchmarks.estimates` analyzes a vision transformer and a small GPT (3,040 exact columns an example) with
exact columns and with 8 and 32 probes, and writes results/<date>-<device>-estimates.md and .json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

import curvscope
from benchmarks import report
from benchmarks.workloads import Workload, seeded, small_gpt, vit
from curvscope.records import Run

NETWORKS: dict[str, Callable[[], Workload]] = {"vit": vit, "small_gpt": small_gpt}
MEASURED = ("rel_frobenius", "cosine", "trace_ratio")
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
STUDENT = {7: 2.365, 31: 2.040}


def analyzed(workload: Workload, fisher: str, samples: int | None, seed: int = 0) -> Run:
    """The default analysis with that root and without a bound on time."""
    return curvscope.analyze(
        workload.model,
        (workload.inputs, workload.targets),
        loss="cross_entropy:class_axis=second",
        fisher=fisher,
        samples=samples,
        seed=seed,
        time=1e9,
        device=workload.inputs.device.type,
    )


def deviations(exact: Run, estimated: Run, column: str, approximation: str) -> list[float]:
    """(estimate - exact) / standard error of every layer that has all three."""
    found = []
    for name, layer in estimated.layers.items():
        known, row = exact.layers[name].errors.get(approximation), layer.errors.get(approximation)
        if known is None or row is None:
            continue
        value, error = getattr(row, column), getattr(row, column + "_stderr")
        truth = getattr(known, column)
        if math.isfinite(value) and math.isfinite(error) and math.isfinite(truth) and error > 0:
            found.append((value - truth) / error)
    return found


def compared(name: str, draws: Sequence[int], seeds: int) -> dict[str, Any]:
    """One network: seconds of every run, and the deviations pooled over layers and seeds."""
    workload = seeded(NETWORKS[name])
    exact = analyzed(workload, "exact", None)
    columns = max(row.columns for row in exact.tables["layers"]) // workload.examples
    result: dict[str, Any] = {"network": name, "columns": columns, "exact": dict(exact.seconds), "probes": []}
    for count in draws:
        runs = [analyzed(workload, "probe", count, seed) for seed in range(seeds)]
        rows = []
        names = sorted({key for layer in runs[0].layers.values() for key in layer.errors})
        for approximation in names:
            for column in MEASURED:
                z = [value for run in runs for value in deviations(exact, run, column, approximation)]
                if z:
                    inside = sum(abs(value) <= STUDENT[count - 1] for value in z) / len(z)
                    rows.append(
                        {
                            "approximation": approximation,
                            "number": column,
                            "values": len(z),
                            "median": median(z),
                            "median_size": median(map(abs, z)),
                            "covered": inside,
                        }
                    )
        seconds = {stage: median(run.seconds[stage] for run in runs) for stage in runs[0].seconds}
        result["probes"].append({"draws": count, "seconds": seconds, "deviations": rows})
    return result


def markdown(document: dict[str, Any]) -> str:
    """The page."""
    about = document["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts = [
        f"# Exact columns against probes, {about['date']}, {about['device']}",
        f"Python {about['python']}, {versions}; one thread. Written by `python -m benchmarks.estimates`. Seconds "
        "are those of one default analysis, export and loading aside (probes: the median over the seeds). z is the "
        "distance of an estimate from the exact number in units of its own standard error, pooled over layers and "
        "seeds; an honest 95 % interval holds the exact number in 95 % of the cases.",
    ]
    for result in document["results"]:
        parts.append(f"## {result['network']}, {result['columns']} exact columns an example")
        head = ["root", "passes", "measures", "all"]
        lines = [["exact", *_seconds(result["exact"])]]
        lines += [[f"{probe['draws']} probes", *_seconds(probe["seconds"])] for probe in result["probes"]]
        parts.append(report.table(head, lines))
        head = ["probes", "number", "values", "median z", "median abs z", "within the 95 % interval"]
        lines = [
            [
                str(probe["draws"]),
                f"{row['approximation']} {row['number']}",
                str(row["values"]),
                f"{row['median']:+.2f}",
                f"{row['median_size']:.2f}",
                f"{row['covered']:.0%}",
            ]
            for probe in result["probes"]
            for row in probe["deviations"]
        ]
        parts.append(report.table(head, lines))
    return "\n\n".join(parts)


def _seconds(seconds: dict[str, float]) -> list[str]:
    every = sum(value for stage, value in seconds.items() if stage not in ("load", "export"))
    return [f"{seconds.get('passes', 0.0):.2f}", f"{seconds.get('measure', 0.0):.2f}", f"{every:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--draws", type=int, nargs="*", default=[8, 32], choices=[8, 32])
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = [compared(name, options.draws, options.seeds) for name in options.networks]
    document = {"about": report.about("cpu"), "results": results}
    text = markdown(document)
    print(text)
    if not options.dry_run:
        report.write(document, text, "estimates")


if __name__ == "__main__":
    main()
