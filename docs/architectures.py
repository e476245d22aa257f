"""Write docs/architectures.md: every architecture of tests/architectures.py, analyzed for real.

Run it from the repository's root: `python -m docs.architectures`.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

import curvscope
from curvscope import Run
from tests.architectures import ARCHITECTURES, Architecture

EXAMPLES = 4
PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Architectures

What one `curvscope.analyze` of each covers. The models are the packages' own classes, small and with random weights
(`tests/architectures.py`), on {examples} examples, in float32, with `fisher="auto"`, on one core; torch {torch}.
This page is written by `python -m docs.architectures`.

- **Kronecker**: the share of parameters in layers with Kronecker factors; **exact only**: in layers whose exact block
  has no Kronecker form (norms, free parameters); what is left is named in the last column.
- **Layers** with and without Kronecker factors. **Columns**: what one example has (all of them, or probes).
- **Seconds**: export of the graph, passes, measures, and the whole call.

"""

TITLES = (
    *("architecture", "package", "parameters", "Kronecker", "exact only", "layers", "columns"),
    *("export", "passes", "measures", "all", "not covered"),
)


def table_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def analyzed(architecture: Architecture) -> tuple[Run, float]:
    """The run and how long all of it took."""
    model, inputs, targets = architecture.build(EXAMPLES)
    start = time.perf_counter()
    run = curvscope.analyze(
        model, (inputs, targets), loss=architecture.loss, example_axes=dict(architecture.example_axes)
    )
    return run, time.perf_counter() - start


def line(name: str, package: str, run: Run, seconds: float) -> str:
    """One row of the table."""
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
    cells = [
        name,
        package,
        f"{total:,}",
        f"{shares['kronecker'] / total:.1%}",
        f"{shares['exact_only'] / total:.1%}",
        f"{len(with_factors)} + {len(exact_only)}",
        f"{columns}{'' if run.info.fisher == 'exact' else ' ' + run.info.fisher}",
        *(f"{run.seconds.get(stage, 0.0):.2f}" for stage in ("export", "passes", "measure")),
        f"{seconds:.2f}",
        "; ".join(f"{reason} ({count / total:.1%})" for reason, count in left.most_common()) or "nothing",
    ]
    return table_row(cells)


def main() -> int:
    """Analyze all, write the page; 1 where one of them failed, which its row then says."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    analyzed(ARCHITECTURES["rnn"])  # the first call pays for imports
    lines, failed = [table_row(TITLES), table_row(["---", "---", *["---:"] * (len(TITLES) - 3), "---"])], 0
    for name, architecture in ARCHITECTURES.items():
        try:
            lines.append(line(name, architecture.package, *analyzed(architecture)))
        except Exception as error:
            failed = 1
            said = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            lines.append(table_row([name, architecture.package, *[""] * (len(TITLES) - 3), said]))
        print(lines[-1], flush=True)
    PAGE.write_text(HEAD.format(examples=EXAMPLES, torch=torch.__version__.partition("+")[0]) + "\n".join(lines) + "\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
