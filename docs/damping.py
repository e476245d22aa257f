"""Write docs/damping.md: the recommended damping of whole-network steps against the best on a fine grid.

Run it from the repository's root: `python -m docs.damping`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import curvscope
from curvscope import pipeline
from curvscope.measure.stage import NetworkStage
from curvscope.measure.whole import WholeNetwork
from sample_models.train import RECIPES, Recipe

FLAVOURS = ("kfac_expand", "kfac_reduce", "ekfac_expand", "ggn")
SEEDS = range(4)
FINE = 40
WITHIN = 0.05
PAGE = Path(__file__).with_suffix(".md")
HEAD = """# The recommended damping against the best

For every sample, other batches of its training data (by their seed) and every flavour, the damping that
`curvscope.analyze` recommends for the whole network (table `global_damping`) is compared with the best of {fine}
dampings, evenly spaced in log over the range of its own grid. Each damping is judged by the actual change of the loss
(with the optimizer's L2 decay, which only graph_gnn has) after one step of all layers, a forward pass in float32.
Where every layer has one position an example, expand and reduce are the same and are listed once. torch {torch}.
This page is written by `python -m docs.damping`.

**{good} of {total} runs ({share:.0%}) are within {within:.0%} of the best decrease** (worst: {worst:.1%} of it lost). A
negative loss means that the recommendation, which is not bound to the fine grid, does better. Where `rho` is negative
or far from 1 the step is one that the quadratic model does not predict: its decrease is this batch's luck as far as the
model goes. The safe range (rho >= 1/4 from there on, and a decrease predicted) then begins higher; the last columns
tell where, and the largest decrease at the dampings that the run judged there.

"""
TITLES = (
    *("sample", "seed", "loss", "flavour", "recommended", "decrease", "best of the grid", "decrease", "lost", "rho"),
    *("safe from", "decrease in the safe range", "passes"),
)


def table_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def analyzed(name: str, recipe: Recipe, batch: Any) -> tuple[curvscope.Run, WholeNetwork, list[float]]:
    """The run, its whole network as it was when the run ended, and the fine grid."""
    stages: list[NetworkStage] = []
    grids: list[list[float]] = []

    def recording(*arguments: Any, **settings: Any) -> NetworkStage:
        stage = NetworkStage(*arguments, **settings)
        assert stage.found is not None
        low, high = math.log10(stage.found.grid[0]), math.log10(stage.found.grid[-1])
        grids.append([10.0 ** (low + (high - low) * i / (FINE - 1)) for i in range(FINE)])
        # the exact block's steps on the fine grid, too, can only be taken while its columns are there
        keeper = stage.found.keeper
        keeper.dampings = sorted({*keeper.dampings, *grids[-1]})
        stages.append(stage)
        return stage

    with mock.patch.object(pipeline, "NetworkStage", recording):
        path = f"sample_models/{name}.pt"
        run = curvscope.analyze(path, batch, measure="steps", example_index=recipe.example_index)
    assert stages[0].found is not None
    return run, stages[0].found, grids[0]


def runs() -> Iterator[tuple[str, float, list[str]]]:
    """For every run: what stands in its row, and the share of the best decrease that the recommendation loses."""
    for name, recipe in RECIPES.items():
        given = recipe.data()
        for seed in SEEDS:
            batch = next(given.batches(recipe.batch_size, 1000 + seed))
            run, network, fine = analyzed(name, recipe, batch)
            single = all(row.positions == 1 for row in run.tables["layers"])
            for flavour in FLAVOURS:
                if single and flavour.endswith("reduce"):
                    continue
                row = next(
                    row
                    for row in run.tables["global_damping"]
                    if (row.approximation, row.form) == (flavour, "eigenbasis")
                )
                if row.status not in ("ok", "estimated"):
                    print(f"{name} {seed} {flavour}: {row.status}, {row.reason}", flush=True)
                    continue
                changes = {d: network.objective.change(network._joint(flavour, "eigenbasis", d)) for d in fine}
                best = min(changes, key=lambda d: changes[d] if math.isfinite(changes[d]) else math.inf)
                lost = 1 - row.change / changes[best]
                cells = [
                    *(name, str(seed), f"{run.model.loss:.4f}", flavour, f"{row.damping:.3g}", f"{-row.change:.5f}"),
                    *(f"{best:.3g}", f"{-changes[best]:.5f}", f"{lost + 0.0:.1%}".replace("-0.0%", "0.0%")),
                    *(f"{row.rho:.2f}", f"{row.safe_from:.3g}"),
                    *(f"{-row.safe_change:.5f}", str(row.passes)),
                ]
                yield name, lost, cells


def main() -> int:
    """Analyze all, write the page."""
    torch.set_num_threads(1)
    lines = [table_row(TITLES), table_row(["---", "---:", "---:", "---", *["---:"] * (len(TITLES) - 4)])]
    losses = []
    for _, lost, cells in runs():
        losses.append(lost)
        lines.append(table_row(cells))
        print(lines[-1], flush=True)
    good = sum(lost <= WITHIN for lost in losses)
    head = HEAD.format(
        fine=FINE,
        good=good,
        total=len(losses),
        share=good / len(losses),
        within=WITHIN,
        worst=max(losses),
        torch=torch.__version__.partition("+")[0],
    )
    PAGE.write_text(head + "\n".join(lines) + "\n")
    print(f"{good} of {len(losses)} within {WITHIN:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
