"""How time and memory grow with the examples N, the columns K and the width d: fitted exponents.

`python -m benchmarks.scaling` runs the small GPT of `workloads.py` and an MLP at sizes that double, one process each,
and fits the slope of log cost over log size by least squares; it writes results/<date>-<device>-scaling.md and .json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from typing import Any

from benchmarks import report

# What each size runs: network, root, draws; the values of the one size that varies.
SWEEPS: dict[str, dict[str, Any]] = {
    "mlp, exact, N": {"network": "mlp", "vary": "examples", "values": [64, 128, 256, 512], "fisher": "exact"},
    "mlp, exact, K": {"network": "mlp", "vary": "classes", "values": [9, 17, 33, 65], "fisher": "exact"},
    "mlp, exact, d": {"network": "mlp", "vary": "d", "values": [128, 256, 512, 1024], "fisher": "exact"},
    "gpt, probe, N": {"network": "gpt", "vary": "examples", "values": [4, 8, 16, 32], "fisher": "probe"},
    "gpt, probe, K": {"network": "gpt", "vary": "samples", "values": [4, 8, 16, 32], "fisher": "probe"},
    "gpt, probe, d": {"network": "gpt", "vary": "d", "values": [32, 64, 128, 256], "fisher": "probe"},
}
SIZES = {
    "mlp": {"examples": 64, "classes": 9, "d": 128},
    "gpt": {"examples": 8, "d": 32, "samples": 8},
}
MEASURES = ("passes", "measure", "bytes")


def one(network: str, vary: str, value: int, fisher: str) -> dict[str, float]:
    """Seconds of the passes and of the measures, and the peak that the analysis adds, in this process."""
    import torch
    from torch import nn

    import curvscope
    from benchmarks.memory import peak_bytes
    from benchmarks.workloads import seeded, small_gpt

    torch.set_num_threads(1)
    sizes = {
        "examples": 64 if network == "mlp" else 8,
        "classes": 9,
        "d": 128 if network == "mlp" else 32,
        "samples": 8,
    }
    sizes[vary] = value
    if network == "mlp":
        torch.manual_seed(0)
        d = sizes["d"]
        model: nn.Module = nn.Sequential(
            nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d), nn.Tanh(), nn.Linear(d, sizes["classes"])
        )
        inputs, targets = torch.randn(sizes["examples"], d), torch.randint(sizes["classes"], (sizes["examples"],))
    else:
        workload = seeded(lambda: small_gpt(d=sizes["d"], examples=sizes["examples"]))
        model, inputs, targets = workload.model, workload.inputs, workload.targets
    small = nn.Sequential(nn.Linear(3, 2))
    batch = (torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
    curvscope.analyze(small, batch, loss="cross_entropy", fisher=fisher)
    before = peak_bytes("cpu")
    run = curvscope.analyze(
        model,
        (inputs, targets),
        loss="cross_entropy:class_axis=second",
        fisher=fisher,
        samples=sizes["samples"] if fisher == "probe" else None,
        time=1e9,
    )
    return {"passes": run.seconds["passes"], "measure": run.seconds["measure"], "bytes": peak_bytes("cpu") - before}


def slope(sizes: list[int], costs: list[float]) -> float:
    """The least-squares slope of log cost over log size."""
    x, y = [math.log(size) for size in sizes], [math.log(max(cost, 1e-12)) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def swept(name: str, repeats: int) -> dict[str, Any]:
    """One sweep, every size in processes of its own; the fastest of the repeats counts."""
    sweep = SWEEPS[name]
    rows = []
    for value in sweep["values"]:
        found = [_in_a_process(sweep["network"], sweep["vary"], value, sweep["fisher"]) for _ in range(repeats)]
        rows.append({key: min(each[key] for each in found) for key in MEASURES})
    # the last doubling tells more than the small sizes, whose cost is calls and not work
    exponents = {
        key: {
            "all": slope(sweep["values"], [row[key] for row in rows]),
            "last": slope(sweep["values"][-2:], [row[key] for row in rows[-2:]]),
        }
        for key in MEASURES
    }
    return {"sweep": name, "sizes": sweep["values"], "rows": rows, "exponents": exponents}


def _in_a_process(network: str, vary: str, value: int, fisher: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scaling", "--one", network, vary, str(value), fisher]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def markdown(document: dict[str, Any]) -> str:
    """The page."""
    about = document["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts = [
        f"# Growth of time and memory, {about['date']}, {about['device']}",
        f"Python {about['python']}, {versions}; one thread, one process a size. Written by `python -m benchmarks."
        "scaling`. Cost grows as size to the exponent: fitted over all sizes, in brackets over the last doubling.",
    ]
    head = ["sweep", "sizes", "passes, s", "measures, s", "peak, MiB", "passes", "measures", "peak"]
    lines = []
    for result in document["results"]:
        rows, exponents = result["rows"], result["exponents"]
        lines.append(
            [
                result["sweep"],
                " ".join(map(str, result["sizes"])),
                " ".join(f"{row['passes']:.2f}" for row in rows),
                " ".join(f"{row['measure']:.2f}" for row in rows),
                " ".join(f"{row['bytes'] / 2**20:.0f}" for row in rows),
                *(f"{exponents[key]['all']:.2f} ({exponents[key]['last']:.2f})" for key in MEASURES),
            ]
        )
    parts.append(report.table(head, lines))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4, metavar=("NETWORK", "VARY", "VALUE", "FISHER"))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.one:
        network, vary, value, fisher = options.one
        print(json.dumps(one(network, vary, int(value), fisher)))
        return
    document = {"about": report.about("cpu"), "results": [swept(name, options.repeats) for name in SWEEPS]}
    text = markdown(document)
    print(text)
    if not options.dry_run:
        report.write(document, text, "scaling")


if __name__ == "__main__":
    main()
