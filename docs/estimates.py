"""Write docs/estimates.md: how often the 95 % intervals of estimates hold the exact number.

Run it from the repository's root: `python -m docs.estimates [--repetitions 500] [--part FILE MODEL...]`. With `--part`
only the shares of some models are computed and kept; without, those kept in FILEs given are put together.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from docs.architectures import table_row
from curvscope.measure import estimate
from tests.measure.coverages import MODELS, coverages, skewness

PAGE = Path(__file__).with_suffix(".md")
DRAWS = (4, 8, 16)
HEAD = """# Error bars: how often they hold

A 95 % interval, value ± t·stderr with t of K − 1 degrees of freedom, is to hold the exact number in 95 % of the cases.
Here the draws of eight models with 12 to 24 examples were repeated with {repetitions} seeds, in float64, and compared
with the exact columns (`tests/measure/coverages.py`; written by `python -m docs.estimates`). A share from
{repetitions} repetitions is itself off by up to {noise:.1%} (two standard errors, at 95 %).

"""
WITHHELD = 0.98
# From here on the page is written by hand, and kept.
BY_HAND = "## Again with more seeds"


def shares(model: str, repetitions: int) -> list[dict[str, Any]]:
    """One row a root, number of draws and number."""
    rows = []
    for fisher in ("probe", "mc"):
        for draws in DRAWS:
            found = coverages(model, fisher, draws, repetitions)
            for (layer, name, quantity), (held, withheld) in found.items():
                row = {"model": model, "fisher": fisher, "draws": draws, "layer": layer, "approximation": name}
                rows.append(row | {"number": quantity, "held": held, "withheld": withheld})
            print(model, fisher, draws, flush=True)
    return rows


def page(rows: list[dict[str, Any]], repetitions: int) -> str:
    """The tables: by model, and by number."""
    noise = 2 * (0.95 * 0.05 / repetitions) ** 0.5
    parts = [HEAD.format(repetitions=repetitions, noise=noise)]
    for title, key in (("model", "model"), ("number", "number")):
        parts.append(_table(rows, title, key))
    printed = [row for row in rows if row["withheld"] < WITHHELD]
    worst = sorted(printed, key=lambda row: row["held"])[:8]
    parts.append("The lowest of all:\n\n" + "\n".join(_listed(row) for row in worst) + "\n\n")
    most = [row for row in printed if row["held"] > 0.99]
    kinds = sorted({f"{row['approximation'].split('_')[0]} {row['number']}" for row in most})
    parts.append(
        f"{len(most)} of {len(printed)} lie above 99 %: their bars are too long. They are of {', '.join(kinds)}, most "
        "of them errors near 0, given only where the estimated square came out positive.\n"
    )
    return "".join(parts)


def certainty_table(models: list[str], factors: list[float], repetitions: int) -> str:
    """mc on models made more and more certain, with nothing withheld: skewness of the draws against coverage, K = 8."""
    estimate.MOST_SKEWED = math.inf
    titles = ("model", "outputs times", "skewness", "numbers", "lowest", "mean", "below 90 %")
    lines = [table_row(titles), table_row(["---"] * len(titles))]
    for model in models:
        for factor in factors:
            found = coverages(model, "mc", 8, repetitions, certainty=factor).values()
            held = [share for share, _ in found if not math.isnan(share)]
            cells = [model, f"{factor:g}", f"{skewness(model, 8, factor):.3f}", str(len(held)), f"{min(held):.1%}"]
            lines.append(table_row([*cells, f"{sum(held) / len(held):.1%}", str(sum(one < 0.9 for one in held))]))
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def _listed(row: dict[str, Any]) -> str:
    name = f"{row['approximation']} {row['number']}"
    return f"- {row['held']:.1%}: {row['model']}, layer {row['layer']}, {row['fisher']}, K = {row['draws']}, {name}"


def _table(rows: list[dict[str, Any]], title: str, key: str) -> str:
    titles = (title, "root", "K", "numbers", "lowest", "mean", "highest", "below 90 %", "withheld for good")
    lines = [table_row(titles), table_row(["---"] * len(titles))]
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row[key], row["fisher"], row["draws"]), []).append(row)
    for (name, fisher, draws), group in groups.items():
        held = [row["held"] for row in group if row["withheld"] < WITHHELD and not math.isnan(row["held"])]
        middle = sum(held) / len(held) if held else math.nan
        values = [f"{value:.1%}" for value in (min(held), middle, max(held))] if held else ["–"] * 3
        below = sum(value < 0.9 for value in held)
        cells = [name, fisher, str(draws), str(len(held)), *values, str(below), str(len(group) - len(held))]
        lines.append(table_row(cells))
    return "\n".join(lines) + "\n\n"


def main() -> None:
    """The page, or a part of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("given", nargs="*")
    parser.add_argument("--repetitions", type=int, default=500)
    parser.add_argument("--part", type=Path)
    parser.add_argument(
        "--certainty", type=float, nargs="*", help="factors on the outputs: print the table of mc alone"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.certainty:
        certainty_table(options.given or list(MODELS), options.certainty, options.repetitions)
        return
    if options.part is not None:
        rows = [row for model in options.given for row in shares(model, options.repetitions)]
        options.part.write_text(json.dumps(rows), encoding="utf-8")
        return
    if options.given:
        rows = [row for file in options.given for row in json.loads(Path(file).read_text(encoding="utf-8"))]
    else:
        rows = [row for model in MODELS for row in shares(model, options.repetitions)]
    by_hand = BY_HAND + PAGE.read_text(encoding="utf-8").partition(BY_HAND)[2]
    PAGE.write_text(page(rows, options.repetitions) + "\n" + by_hand, encoding="utf-8")


if __name__ == "__main__":
    main()
