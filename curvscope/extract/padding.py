"""Padded positions: found by their gradients, left out of the counts."""

from __future__ import annotations

from torch import Tensor

from curvscope.extract.rows import SiteRows
from curvscope.graph.functional import Graph
from curvscope.graph.verify import Layouts


class Padding:
    """Finds padded positions: rows whose gradient is exactly zero in every column at every linear layer of their kind.

    Layers are grouped by the number of positions an example has; a position is padding only where all of a group's
    layers agree, since a single layer's row may vanish for other reasons (dead units, a pooled first token). An
    example whose rows all vanish has a saturated loss, not only padding: it is left alone.
    """

    def __init__(self, graph: Graph, layouts: Layouts) -> None:
        self.layouts = layouts
        self.linear = {}
        for site in graph.sites():
            # a convolution's positions are all real: its rows vanish where units are dead
            positions = layouts.positions[site.target] if site.kind == "linear" else 1
            if positions > 1:
                self.linear[site.target] = (SiteRows(site.module, layouts.sites[site.target]), positions)
        self.alive: dict[int, Tensor | None] = {}
        self.done: set[int] = set()
        self.counts = False

    def receive(self, target: str, gradient: Tensor) -> None:
        """One site's output gradient of a column's pass."""
        if not self.counts or target not in self.linear:
            return
        rows, positions = self.linear[target]
        if positions in self.done:
            return
        # One product with ones would miss cancelling entries: the largest absolute entry can't.
        alive = rows.outputs(gradient).abs().amax(-1) > 0
        known = self.alive.get(positions)
        alive = alive if known is None else alive | known
        self.alive[positions] = alive
        if bool(alive.all()):
            self.done.add(positions)

    def masks(self) -> dict[str, Tensor]:
        """Site -> which of its rows [N, R] are real, for groups in which some are not."""
        found = {}
        for target, (_, positions) in self.linear.items():
            alive = self.alive.get(positions)
            if positions in self.done or alive is None:
                continue
            real = alive | ~alive.any(1, keepdim=True)
            if not bool(real.all()):
                found[target] = real
        return found
