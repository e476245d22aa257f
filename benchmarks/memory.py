"""Peak memory of the whole default analysis, against its bound and the model's own.

Three processes: one that imports everything, exports a small model and makes the workload (the base); one that then
trains a step (the model's own); one that analyzes under a bound. `python -m benchmarks.memory vit analysis
--bytes 268435456` is one such process and prints its peak in bytes (and what was planned), as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Literal

Stage = Literal["base", "step", "analysis"]
STAGES: tuple[Stage, ...] = ("base", "step", "analysis")
STATUS = Path("/proc/self/status")


def peak_bytes(device: str) -> int:
    """The largest memory this process has held: of the device's allocator, or resident."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    if STATUS.exists():
        # ru_maxrss would start from what the parent held when it started this process.
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(workload: str, memory: int, device: str, threads: int) -> dict[str, int | bool | str]:
    """Bytes: the bound given, the base, what a training step and what the analysis add to it, and the verdict."""
    found = {stage: _stage_of(workload, stage, memory, device, threads) for stage in STAGES}
    peaks = {stage: int(each["peak"]) for stage, each in found.items()}
    own, used = peaks["step"] - peaks["base"], peaks["analysis"] - peaks["base"]
    return {
        "workload": workload,
        "bound": memory,
        "base": peaks["base"],
        "step": own,
        "analysis": used,
        "planned": found["analysis"]["planned"],
        "not_assessed": found["analysis"]["not_assessed"],
        "layers": found["analysis"]["layers"],
        "refused": bool(found["analysis"].get("refused")),
        "within": used <= memory + own,
    }


def _stage_of(workload: str, stage: Stage, memory: int, device: str, threads: int) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.memory", workload, stage]
    command += ["--bytes", str(memory), "--device", device]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _stage(workload_name: str, stage: Stage, memory: int, device: str) -> dict[str, int]:
    import torch
    from torch import nn

    import curvscope
    from benchmarks.ours import analyze
    from benchmarks.workloads import make
    from curvscope import pipeline
    from curvscope.errors import UsageError

    small = nn.Sequential(nn.Linear(3, 2)).to(device)
    batch = (torch.randn(4, 3, device=device), torch.zeros(4, dtype=torch.long, device=device))
    curvscope.analyze(small, batch, loss="cross_entropy", device=device)
    workload = make(workload_name).to(device)
    if stage == "step":
        loss = nn.functional.cross_entropy(workload.model(workload.inputs), workload.targets)
        loss.backward()
    elif stage == "analysis":
        try:
            run = analyze(workload, memory=memory)
        except UsageError:  # the bound is below what the factors take: refused, with the least that it would have to be
            return {"peak": peak_bytes(device), "planned": 0, "layers": 0, "not_assessed": 0, "refused": 1}
        found = {"peak": peak_bytes(device), "layers": len(run.layers)}
        found["not_assessed"] = sum(layer.row.status == "not_assessed" for layer in run.layers.values())
        batch = (workload.inputs, workload.targets)
        planned = pipeline.plan(workload.model, batch, loss="cross_entropy", memory=memory, device=device)
        return {**found, "planned": planned.peak_bytes}
    return {"peak": peak_bytes(device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(json.dumps(_stage(options.workload, options.stage, options.bytes, options.device)))


if __name__ == "__main__":
    main()
