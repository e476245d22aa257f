"""One workload at one thread count, in a process of its own: rounds of floor, ours, peer, and what they came to.

`python -m benchmarks.rounds vit --threads 2` prints one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from typing import Any

import torch

from benchmarks import peers
from benchmarks.breakdown import breakdown
from benchmarks.clock import Spread, ratios, seconds_of
from benchmarks.floor import Floor, matrix_rate
from benchmarks.ours import Ours, analyze
from benchmarks.workloads import WORKLOADS, Workload, make

WARM_UPS = 2


def run(name: str, repeats: int, device: str, analysis: bool) -> dict[str, Any]:
    """Everything measured of one workload: counts, rounds, ratios, where our time goes, agreement of the factors."""
    workload = make(name).to(device)
    floor, ours = Floor(workload), Ours(workload)
    peer = importlib.util.find_spec("curvlinops") is not None
    found: dict[str, Any] = {
        "workload": name,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "columns": workload.columns,
        "cost": floor.cost.as_dict(),
        "strategy": floor.strategy,
        "candidates": floor.candidates,
        "agreement": agreement(workload, ours, peer),
    }
    rounds = _rounds(workload, floor, ours, peer, repeats, device)
    found["rounds"] = rounds
    found["medians"] = {part: Spread.of(values).as_dict() for part, values in rounds.items()}
    pairs = [("ours", "floor"), ("ours", "floor+gradient")]
    pairs += [("curvlinops", "floor"), ("ours", "curvlinops")] if peer else []
    found["ratios"] = {f"{a} / {b}": ratios(rounds[a], rounds[b]).as_dict() for a, b in pairs}
    found["breakdown"] = breakdown(ours.factors_and_gradient)
    if analysis:
        found["analysis"] = _analysis(workload, floor, max(repeats // 3, 3), device)
    return found


def agreement(workload: Workload, ours: Ours, peer: bool) -> dict[str, Any]:
    """The largest relative difference of any layer's product to factors straight from the definitions.

    With mc the peer's labels are the reference's, and ours are others: there ours is compared in A alone. Layers that
    only we have (embeddings) are not compared.
    """
    reference = peers.naive_factors(workload)
    found: dict[str, Any] = {}
    if peer:
        found["curvlinops"] = peers.worst_difference(peers.curvlinops_factors(workload), reference)
    factors = ours.factors()
    if workload.fisher == "mc":
        factors = {
            flavour: {name: (layers[name][0], B) for name, (_, B) in reference[flavour].items()}
            for flavour, layers in factors.items()
        }
    found["ours"] = peers.worst_difference(factors, reference)
    return found


def _rounds(
    workload: Workload, floor: Floor, ours: Ours, peer: bool, repeats: int, device: str
) -> dict[str, list[float]]:
    rounds: dict[str, list[float]] = {}
    for index in range(WARM_UPS + repeats):
        rate = matrix_rate(device)
        seconds = {"rate": rate, **floor.seconds(rate), "ours": seconds_of(ours.factors_and_gradient)}
        if peer:
            seconds["curvlinops"] = seconds_of(lambda: peers.curvlinops_factors(workload))
        if index >= WARM_UPS:
            for part, value in seconds.items():
                rounds.setdefault(part, []).append(value)
    return rounds


def _analysis(workload: Workload, floor: Floor, repeats: int, device: str) -> dict[str, Any]:
    """The whole default analysis, export aside, against the floor, in rounds of both."""
    analyze(workload)
    floors, totals, stages = [], [], []
    for _ in range(repeats):
        floors.append(floor.seconds(matrix_rate(device))["floor"])
        start = time.perf_counter()
        seconds = analyze(workload).seconds
        totals.append(time.perf_counter() - start - seconds["export"])
        stages.append(seconds)
    return {
        "seconds": Spread.of(totals).as_dict(),
        "ratio": ratios(totals, floors).as_dict(),
        "stages": {name: Spread.of([each[name] for each in stages]).as_dict() for name in stages[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=sorted(WORKLOADS))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--analysis", action="store_true", help="time the whole default analysis, too")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(json.dumps(run(options.workload, options.repeats, options.device, options.analysis)))


if __name__ == "__main__":
    main()
