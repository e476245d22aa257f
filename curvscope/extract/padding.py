"""Padded positions: found by their gradients, confirmed by perturbing them, left out of the counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvscope.extract.rows import SiteRows
from curvscope.graph.functional import Graph
from curvscope.graph.ragged import Ragged
from curvscope.graph.verify import Layouts


class Judge:
    """Whether idle rows are padding, over all pieces of the data: some examples have to have others than the rest."""

    def __init__(self) -> None:
        self.patterns: dict[str, tuple[bool, ...] | None] = {}
        self.refuted: set[str] = set()

    def tell(self, targets: Sequence[str], real: Tensor | None, *, idle: bool) -> None:
        """What one piece shows at these sites: which rows [N, R] are real (None: all), and whether the rest is idle."""
        shared = () if real is None else _shared(real)
        for target in targets:
            if target not in self.patterns:
                self.patterns[target] = shared
            elif self.patterns[target] != shared:
                self.patterns[target] = None
            if not idle:
                self.refuted.add(target)

    def padded(self, targets: Sequence[str]) -> bool:
        """Whether the masks that were given for these sites hold."""
        return all(self._holds(target) for target in targets)

    def _holds(self, target: str) -> bool:
        pattern = self.patterns.get(target, ())
        return pattern == () or (pattern is None and target not in self.refuted)


def _shared(real: Tensor) -> tuple[bool, ...] | None:
    """The rows that are real in every example alike, without those at the end that are in none; None if they differ.

    () says that all are real.
    """
    if bool(real.all()):
        return ()
    if not bool((real == real[:1]).all()):
        return None
    row = [bool(value) for value in real[0].tolist()]
    while not row[-1]:
        row.pop()
    return tuple(row)


class Padding:
    """Finds positions that no output of their example depends on, as attention masks and masked means leave them.

    A candidate has an output gradient of exactly zero in every column, at every linear layer with as many positions. A
    layer that is called once a position, as recurrent ones are, stands for itself. Dead units and max pooling leave
    such rows, too, so candidates are confirmed: whatever the layers put there, the outputs that the loss depends on
    must stay the same. Positions that are idle in all examples alike are a selection (a pooled first token), not
    padding, and so is an example without any gradient (a saturated loss): both are left alone.
    """

    def __init__(self, graph: Graph, layouts: Layouts, *, piece: bool = False) -> None:
        self.graph = graph
        self.layouts = layouts
        self.linear: dict[str, SiteRows] = {}
        # sites whose rows are judged together: those with as many positions, or the calls of one layer
        self.keys: dict[str, int | str] = {}
        self.calls: dict[str, list[str]] = {}
        for site in graph.sites():
            # a convolution's positions are all real: its rows vanish where units are dead
            known = isinstance(layouts.sites[site.target], Ragged)  # its rows are all real
            if site.kind not in ("linear", "embedding") or known or not (layouts.examples > 1 or piece):
                continue
            positions = layouts.positions[site.target]
            if positions > 1:
                self.keys[site.target] = positions
            elif positions == 1:
                self.calls.setdefault(site.layer, []).append(site.target)
        self.calls = {layer: targets for layer, targets in self.calls.items() if len(targets) > 1}
        self.keys |= {target: target for targets in self.calls.values() for target in targets}
        for site in graph.sites():
            if site.target in self.keys:
                self.linear[site.target] = SiteRows(site.module, layouts.sites[site.target])
        self.alive: dict[int | str, Tensor] = {}
        self.done: set[int | str] = set()
        self.counts = False
        self.matters: Tensor | None = None

    def start(self, cotangent: Tensor, *, counts: bool) -> None:
        """The next pass's cotangent, and whether it is a column (the loss's own gradient is not)."""
        self.counts = counts
        if self.linear:
            reached = cotangent != 0
            self.matters = reached if self.matters is None else self.matters | reached

    def receive(self, target: str, gradient: Tensor) -> None:
        """One site's output gradient of a column's pass."""
        if not self.counts or target not in self.linear:
            return
        key = self.keys[target]
        if key in self.done:
            return
        # A product with ones would miss entries that cancel: the largest absolute entry can't.
        alive = self.linear[target].outputs(gradient).abs().amax(-1) > 0
        if key in self.alive:
            alive = alive | self.alive[key]
        self.alive[key] = alive
        if bool(alive.all()):
            self.done.add(key)

    def masks(self, tensors: Sequence[Tensor], output: Tensor, judge: Judge | None = None) -> dict[str, Tensor]:
        """Site -> which of its rows [N, R] are real, for groups in which some are not.

        With a `judge` this batch is a piece of the data: rows that all its examples leave idle alike may still be
        padding, so the masks are given all the same, and the judge is told what was found.
        """
        found: dict[str, Tensor] = {}
        for parts, alive in self._together():
            if bool(alive.all()):
                if judge is not None:
                    judge.tell(list(parts), None, idle=True)
                continue
            real = alive | ~alive.any(1, keepdim=True)
            if judge is None and bool((real == real[:1]).all()):
                continue
            idle = bool(real.all()) or self._idle({t: ~real[:, part] for t, part in parts.items()}, tensors, output)
            if judge is not None:
                judge.tell(list(parts), real, idle=idle)
            if idle and not bool(real.all()):
                found |= {target: real[:, part] for target, part in parts.items()}
        return found

    def _together(self) -> Iterator[tuple[dict[str, slice], Tensor]]:
        """Sites that are judged together, with the rows of each among all of theirs, and which are alive [N, R]."""
        for key, alive in self.alive.items():
            if isinstance(key, int):
                yield {target: slice(None) for target, own in self.keys.items() if own == key}, alive
        for targets in self.calls.values():
            known = next((self.alive[target] for target in targets if target in self.alive), None)
            if known is not None:
                parts = {target: slice(place, place + 1) for place, target in enumerate(targets)}
                idle = torch.zeros_like(known)  # of a call that no gradient reached
                yield parts, torch.cat([self.alive.get(target, idle) for target in targets], 1)

    def _idle(self, candidates: Mapping[str, Tensor], tensors: Sequence[Tensor], output: Tensor) -> bool:
        """Whether large noise in the candidates' rows [N, R], at all sites at once, leaves the output as it is."""
        modules = {site.target: site.module for site in self.graph.sites()}
        generator = torch.Generator().manual_seed(2)
        handles = []

        def disturber(target: str) -> Any:
            layout = self.linear[target].layout

            def disturb(module: Any, args: Any, result: Tensor) -> Tensor:
                places = layout.rows(torch.arange(result.numel(), device=result.device).view(result.shape))
                chosen = places[candidates[target]].flatten()
                noise = torch.randn(chosen.numel(), generator=generator).to(result)
                scale = 10 * result.abs().max()
                return result.flatten().index_add(0, chosen, noise * scale).view(result.shape)

            return disturb

        try:
            for target in candidates:
                handles.append(modules[target].register_forward_hook(disturber(target)))
            with torch.no_grad():
                disturbed = self.graph.run(*tensors)
        finally:
            for handle in handles:
                handle.remove()
        tolerance = 100 * torch.finfo(output.dtype).eps * float(output.detach().abs().max())
        change = (disturbed - output.detach()).abs()
        return float(change[self.matters].max()) <= tolerance
