"""The results as a Markdown page and a JSON file: what was measured, on what kind of device, with which versions."""

from __future__ import annotations

import datetime
import json
import platform
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
DISTRIBUTIONS = ("torch", "backpack-for-pytorch", "curvlinops-for-pytorch", "numpy")
FLOP_PARTS = ("forward", "backward", "a_expand", "b_expand", "a_reduce", "b_reduce", "gradient", "row_megabytes")
TIMES = ("forward", "passes", "products", "floor", "floor+gradient", "ours", "curvlinops")

Document = dict[str, Any]


def about(device: str, note: str = "") -> dict[str, Any]:
    """Date, device, versions and a remark; no names of machines."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": _device(device),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in DISTRIBUTIONS},
        "note": note,
    }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"model name\s*:\s*(.+)", information.read_text())
        if found:
            return found[1].strip()
    return platform.machine()


def write(document: Document, text: str, kind: str = "") -> list[Path]:
    """Paths of the Markdown and the JSON file, named by date and device; a run of the same day replaces them."""
    FOLDER.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", document["about"]["device"].lower()).strip("-")
    stem = f"{document['about']['date']}-{slug}" + (f"-{kind}" if kind else "")
    paths = [FOLDER / f"{stem}.md", FOLDER / f"{stem}.json"]
    paths[0].write_text(text + "\n")
    paths[1].write_text(json.dumps(document, indent=1) + "\n")
    return paths


def markdown(document: Document) -> str:
    """The page."""
    facts = document["about"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    results = document["results"]
    parts = [
        f"# Benchmarks, {facts['date']}, {facts['device']}",
        f"Python {facts['python']}, {versions}. Medians over the rounds, smallest and largest in brackets; ratios are "
        "taken round by round within one process. What the columns mean: [the benchmarks' README](../README.md).",
        *([facts["note"]] if facts["note"] else []),
        "## Ratios",
        _ratios(results),
        "## Milliseconds",
        _milliseconds(results),
        "## Flops and bytes",
        _flops(results),
        "## Where our time goes",
        "One call under a profiler, whose own cost is in it: shares, not times.",
        _breakdowns(results),
        "## Are the factors right?",
        "Largest relative difference of a layer's product kron(B, A) to factors computed from their definitions (ours "
        "with mc: of A alone, since it draws other labels).",
        _agreement(results),
    ]
    analyses = [result for result in results if "analysis" in result]
    if analyses:
        parts += ["## The whole default analysis, export aside", _analyses(analyses)]
    if document["memory"]:
        parts += [
            "## Peak memory of the default analysis",
            "MiB, in three processes. Base: everything imported, a small model analyzed, the workload made. Own: what "
            "one training step adds. Analysis: what the analysis adds. The aim is analysis <= bound + own.",
            memory_table(document["memory"]),
        ]
    return "\n\n".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(spread: dict[str, float] | None, scale: float = 1.0, digits: int = 2) -> str:
    if spread is None:
        return "-"
    median, low, high = (scale * spread[key] for key in ("median", "low", "high"))
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _labelled(results: Sequence[Document], row: Callable[[Document], list[str]]) -> list[list[str]]:
    return [[result["workload"], str(result["threads"]), *row(result)] for result in results]


def _ratios(results: Sequence[Document]) -> str:
    names = list(dict.fromkeys(name for result in results for name in result["ratios"]))
    rows = _labelled(results, lambda result: [_spread(result["ratios"].get(name)) for name in names])
    return table(["workload", "threads", *names], rows)


def _milliseconds(results: Sequence[Document]) -> str:
    def row(result: Document) -> list[str]:
        medians = result["medians"]
        rate = f"{medians['rate']['median'] / 1e9:.0f}"
        return [rate, *(_spread(medians.get(name), 1e3, 1) for name in TIMES), result["strategy"]]

    head = ["workload", "threads", "GFLOP/s", *TIMES, "passes by"]
    return table(head, _labelled(results, row))


def _flops(results: Sequence[Document]) -> str:
    once = {result["workload"]: result for result in results}.values()
    rows = [
        [result["workload"], str(result["columns"]), *(f"{result['cost'][part]:.2f}" for part in FLOP_PARTS)]
        for result in once
    ]
    return table(["workload", "K", *(part.replace("_", " ") for part in FLOP_PARTS)], rows)


def _breakdowns(results: Sequence[Document]) -> str:
    names = list(dict.fromkeys(name for result in results for name in result["breakdown"]))

    def row(result: Document) -> list[str]:
        shares = result["breakdown"]
        total = sum(shares.values())
        return [f"{100 * shares.get(name, 0.0) / total:.0f} %" for name in names]

    return table(["workload", "threads", *names], _labelled(results, row))


def _agreement(results: Sequence[Document]) -> str:
    def row(result: Document) -> list[str]:
        found = result["agreement"]
        return [
            f"{found[tool][flavour]:.1e}" if tool in found else "-"
            for tool in ("ours", "curvlinops")
            for flavour in ("expand", "reduce")
        ]

    head = ["workload", "threads", "ours, expand", "ours, reduce", "curvlinops, expand", "curvlinops, reduce"]
    return table(head, _labelled(results, row))


def _analyses(results: Sequence[Document]) -> str:
    def row(result: Document) -> list[str]:
        analysis = result["analysis"]
        stages = ", ".join(f"{name} {spread['median']:.2f}" for name, spread in analysis["stages"].items())
        return [_spread(analysis["seconds"]), _spread(analysis["ratio"], digits=1), stages]

    return table(["workload", "threads", "seconds", "times the floor", "seconds by stage"], _labelled(results, row))


def memory_table(peaks: Sequence[Document]) -> str:
    """Bounds, plans and peaks in MiB, one row a workload and bound."""

    def row(peak: Document) -> list[str]:
        mebibytes = [f"{peak[name] / 2**20:.0f}" for name in ("bound", "base", "step", "planned", "analysis")]
        if peak.get("refused"):
            return [peak["workload"], *mebibytes[:3], "–", mebibytes[4], "–", "refused"]
        left_out = f"{peak['not_assessed']} of {peak['layers']}"
        return [peak["workload"], *mebibytes, left_out, "within" if peak["within"] else "above"]

    return table(
        ["workload", "bound", "base", "own", "planned", "analysis", "not assessed", "verdict"],
        [row(peak) for peak in peaks],
    )
