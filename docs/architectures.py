"""Write docs/architectures.md: architectures of public packages, analyzed and compared with brute force.

Run it from the repository's root: `python -m docs.architectures`; it takes two processes.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from curvscope import Run
from tests.architectures import ARCHITECTURES
from tests.brute_force import deviations, exact_run, in_float64
from tests.families import FAMILIES

EXAMPLES = 2
COMPARED = 8
WORKERS = 2
EVERY = ARCHITECTURES | FAMILIES
PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Architectures

What one `curvscope.analyze` of each covers, and how far its exact blocks are from brute force. The models are the
packages' own classes, small and with random weights: those of `tests/architectures.py` are tested in CI one by one,
those of `tests/families.py` here (and a few in CI). {examples} examples, exact, float64, one thread; torch {torch},
{packages}. This page is written by `python -m docs.architectures`.

- **Kronecker**: the share of parameters in layers with Kronecker factors; **exact only**: in layers whose exact block
  has no Kronecker form (norms, free parameters, experts looked up by a gate); what is left is named in the last column.
- **Layers** with and without Kronecker factors. **Columns**: what one example has.
- **Seconds** of CPU, the whole call: export, passes, all measures.
- **Deviation** of up to {compared} layers' blocks V Vᵀ, spread over the model, from Σ JₙᵀHₙJₙ with J by one backward
  pass an output through the model itself: the largest, relative to the block's largest entry.

{count} architectures, {covered} of them covered whole. Largest deviation: {worst}.

"""

TITLES = (
    *("architecture", "package", "parameters", "Kronecker", "exact only", "layers", "columns"),
    *("seconds", "deviation", "not covered"),
)


def table_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def line(name: str) -> tuple[str, float, bool]:
    """One row of the table, its deviation, and whether everything is covered."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    architecture = EVERY[name]
    try:
        built = in_float64(architecture.build(EXAMPLES))
        start = time.process_time()
        run = exact_run(architecture, built)
        seconds = time.process_time() - start
        deviation = max(deviations(architecture, run, built, COMPARED).values())
    except Exception as error:
        said = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return table_row([name, architecture.package, *[""] * (len(TITLES) - 3), said]), float("nan"), False
    cells = [name, architecture.package, *covered(run)]
    cells[-1:-1] = [f"{seconds:.1f}", f"{deviation:.0e}"]
    return table_row(cells), deviation, cells[-1] == "nothing"


def covered(run: Run) -> list[str]:
    """The cells that say what is covered."""
    rows = run.tables["coverage"]
    total = sum(row.count for row in rows)
    shares = Counter({row.treatment: 0 for row in rows})
    left: Counter[str] = Counter()
    for row in rows:
        shares[row.treatment] += row.count
        if row.treatment in ("uncovered", "frozen"):
            left[row.reason] += row.count
    with_factors = {row.layer for row in rows if row.treatment == "kronecker"}
    exact_only = {row.layer for row in rows if row.treatment == "exact_only"}
    columns = max(row.columns for row in run.tables["layers"]) // run.model.examples
    return [
        f"{total:,}",
        f"{shares['kronecker'] / total:.1%}",
        f"{shares['exact_only'] / total:.1%}",
        f"{len(with_factors)} + {len(exact_only)}",
        f"{columns}",
        "; ".join(f"{reason} ({count / total:.1%})" for reason, count in left.most_common()) or "nothing",
    ]


def packages() -> str:
    """The versions of the packages whose classes these are."""
    from importlib.metadata import version

    return ", ".join(f"{name} {version(name)}" for name in ("torchvision", "transformers", "torch-geometric"))


def main() -> int:
    """Analyze all, write the page; 1 where one of them failed, which its row then says."""
    rows = []
    warm = ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn"), line, ("rnn",))  # first calls pay imports
    with warm as pool:
        for row in pool.map(line, EVERY):
            rows.append(row)
            print(row[0], flush=True)
    deviations_found = [deviation for _, deviation, _ in rows if deviation == deviation]
    head = HEAD.format(
        examples=EXAMPLES,
        compared=COMPARED,
        torch=torch.__version__.partition("+")[0],
        packages=packages(),
        count=len(rows),
        covered=sum(whole for _, _, whole in rows),
        worst=f"{max(deviations_found):.0e}",
    )
    titles = [table_row(TITLES), table_row(["---", "---", *["---:"] * (len(TITLES) - 3), "---"])]
    PAGE.write_text(head + "\n".join([*titles, *(text for text, _, _ in rows)]) + "\n")
    return int(len(deviations_found) < len(rows))


if __name__ == "__main__":
    sys.exit(main())
