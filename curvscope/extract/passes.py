"""Sweeps over all pieces of the data, put together as if it had been one batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from curvscope.errors import out_of_memory
from curvscope.extract.clock import now
from curvscope.extract.collector import Extract, Form
from curvscope.extract.cost import PassSeconds
from curvscope.extract.footprint import release
from curvscope.extract.layer_bytes import ROWS_BYTES
from curvscope.extract.merge import Merged
from curvscope.extract.padding import Judge
from curvscope.extract.pieces import Piece, Pieces
from curvscope.extract.projected import Bases, ProjectedCollector
from curvscope.extract.roots import Root, make_root, outputs_an_example
from curvscope.extract.sweep import Progress, layers_with_rows, no_progress, sweep
from curvscope.extract.symmetric import BlockSum
from curvscope.graph.functional import Graph
from curvscope.graph.verify import Independent

# Sweeps that are timed, the first one not counted.
TIMED_SWEEPS = 3
MOST_SWEEPS = 8
TIMED_SECONDS = 0.1


class Passes:
    """The sweeps of one analysis over the same pieces.

    Attributes:
        columns: K.
        unit: `Root.unit` of everything that the sweeps return.
        loss: L over all data, once the first sweep has run.
        rows_bytes: what rows kept beside columns of another form may take together.
        rest: dL/dp of the trained parameters that belong to no layer, likewise.
    """

    def __init__(
        self,
        graph: Graph,
        pieces: Pieces,
        *,
        fisher: str,
        samples: int,
        seed: int,
        independent: Independent | None = None,
    ) -> None:
        self.graph = graph
        self.pieces = pieces
        self.fisher = fisher
        self.samples = samples
        self.seed = seed
        self.independent = independent
        exact = pieces.survey.columns
        self.columns = exact if fisher == "exact" else 1 if fisher == "empirical" else samples
        self.unit: float | None = None
        self.rows_bytes = ROWS_BYTES
        self.loss = 0.0
        self.rest: dict[str, Tensor] = {}
        self._whole: Root | None = None

    def settle(self, outputs: Tensor) -> None:
        """Takes the root now where all data is one piece, whose outputs are at hand: K is then known exactly.

        Raises:
            LossError, UsageError: see `curvscope.extract.roots.make_root`.
        """
        if self.pieces.in_pieces():
            return
        (piece,) = self.pieces
        try:
            self._whole = self.root(piece, outputs)
            self.columns = self._whole.columns
        except Exception as error:
            if not out_of_memory(error) or not self._halve():
                raise

    @property
    def shared(self) -> bool:
        """Whether one pass serves all positions: known once `settle` took the root."""
        return self._whole is not None and self._whole.shared

    def _halve(self) -> bool:
        """Smaller pieces; not where positions count as examples, since the plan is made for these."""
        return not self.shared and self.pieces.halve()

    def pass_seconds(self) -> PassSeconds:
        """The seconds of one sweep over all data that keeps no columns, from passes over the first piece.

        The fewest of at least two sweeps (and of as many as fit in a tenth of a second), after one that pays for
        memory that is new to the process.
        """
        piece = next(iter(self.pieces))
        found: list[tuple[float, float]] = []
        total = 0.0
        while len(found) < TIMED_SWEEPS or (total < TIMED_SECONDS and len(found) < MOST_SWEEPS):
            each = self._timed_sweep(piece)
            # forward and gradient, one or two columns, then the sums' results
            found.append((each[0] + each[-1], each[-2]))
            total += sum(each)
        release()
        share = self.pieces.survey.examples / piece.layouts.examples
        once, column = (min(values) for values in zip(*found[1:], strict=True))
        return PassSeconds(once * share, column * share)

    def _timed_sweep(self, piece: Piece) -> list[float]:
        """Seconds from one mark of a sweep over at most two columns to the next."""
        device = self.pieces.device
        names = [spec.name for spec in self.graph.chosen()]
        marks = [now(device)]
        sweep(
            self.graph,
            piece.tensors,
            piece.layouts,
            lambda outputs: replace(self.root(piece, outputs), columns=min(2, self.columns)),
            dict.fromkeys(names),
            gradient_only=[name for name in self.graph.layers if name not in names],
            progress=lambda *_: marks.append(now(device)),
            judge=Judge(),
        )
        marks.append(now(device))
        return [late.since(early) for early, late in itertools.pairwise(marks)]

    def root(self, piece: Piece, outputs: Tensor) -> Root:
        """The root of a piece's share of L in its outputs."""
        if not piece.counts:
            zeros = torch.zeros_like(outputs)
            count = outputs_an_example(outputs, piece.layouts.output)
            return Root(self.fisher, 1, lambda k: zeros, zeros, 0.0, count, self.unit or 1.0)
        found = make_root(
            self.pieces.loss,
            outputs,
            piece.targets,
            piece.layouts.output,
            fisher=self.fisher,
            samples=self.samples,
            seed=self.seed,
            start=piece.start,
            independent=self.independent,
        )
        return found if piece.share == 1.0 else _scaled(found, piece.share)

    def sweep(
        self,
        forms: Mapping[str, Form | None],
        *,
        first: bool,
        per_draw: Collection[str] = (),
        gradient_only: Sequence[str] = (),
        progress: Progress = no_progress,
    ) -> dict[str, Extract]:
        """One sweep over all pieces: `curvscope.extract.sweep.sweep` of their concatenation, to rounding.

        The first one also finds factors and gradients, and sets `loss`, `rest` and `unit`. Where memory runs out it is
        run again over pieces of half as many examples, down to one.

        Raises:
            CurvscopeError: naming the batch where there are several.
        """
        while True:
            try:
                return self._sweep(forms, first, per_draw, gradient_only, progress)
            except Exception as error:
                if not out_of_memory(error) or not self._halve():
                    raise
            # outside of the handler: the failed pass's tensors go with its traceback
            self._whole = None
            if first:
                self.loss, self.rest, self.unit = 0.0, {}, None
            release()

    def project(
        self, bases: Mapping[str, Bases], piece_bytes: int, progress: Progress = no_progress
    ) -> dict[str, dict[str, Tensor]]:
        """Layer -> the diagonals of its block in each of its bases and in none, see `curvscope.extract.projected`.

        float64, [d_out, d_in(+1)], in the unit of the first sweep.
        """
        sums: dict[str, dict[str, Tensor]] = {name: {} for name in bases}
        for piece in self.pieces:
            release()
            with self.pieces.named(piece.name):
                collectors = {
                    name: ProjectedCollector(self.graph.layers[name], piece.layouts, each, piece_bytes)
                    for name, each in bases.items()
                }
                sweep(
                    self.graph,
                    piece.tensors,
                    piece.layouts,
                    self._taker(piece, [], {}),
                    {},
                    factors=False,
                    progress=self._told(progress, piece),
                    projected=collectors,
                )
                for name, collector in collectors.items():
                    for key, value in collector.sums.items():
                        sums[name][key] = sums[name][key] + value if key in sums[name] else value
        return {
            name: {key: value.view(self.graph.layers[name].d_out, -1) for key, value in found.items()}
            for name, found in sums.items()
        }

    def _sweep(
        self,
        forms: Mapping[str, Form | None],
        first: bool,
        per_draw: Collection[str],
        gradient_only: Sequence[str],
        progress: Progress,
    ) -> dict[str, Extract]:
        survey = self.pieces.survey
        merged = {
            name: Merged(survey.examples, self.columns)
            for name in [*forms, *(name for name in gradient_only if name not in forms)]
        }
        rows = layers_with_rows(
            self.graph.layers,
            forms,
            survey.positions,
            examples=survey.examples,
            columns=self.columns,
            itemsize=self.pieces.itemsize,
            limit=self.rows_bytes,
        )
        judge = Judge() if self.pieces.in_pieces() else None
        blocks: dict[str, BlockSum] = {}
        for piece in self.pieces:
            release()  # what the piece before took
            with self.pieces.named(piece.name):
                taken: list[Root] = []
                extracts = sweep(
                    self.graph,
                    piece.tensors,
                    piece.layouts,
                    self._taker(piece, taken, merged),
                    forms,
                    factors=first,
                    per_draw=per_draw,
                    gradient_only=gradient_only,
                    progress=self._told(progress, piece),
                    judge=judge,
                    blocks=blocks,
                    formed_draws=self.columns if self.fisher in ("probe", "mc") else 0,
                    rows=rows,
                )
                for name in list(extracts):
                    merged[name].add(extracts.pop(name))  # freed as soon as it is taken in
                if first:
                    self.loss += taken[0].loss * piece.share
                    for name, gradient in self.graph.rest(piece.tensors, taken[0].gradient).items():
                        self.rest[name] = self.rest[name] + gradient if name in self.rest else gradient
        return {
            name: each.result(judge is None or judge.padded([site.target for site in self.graph.layers[name].sites]))
            for name, each in merged.items()
        }

    def _taker(self, piece: Piece, taken: list[Root], merged: Mapping[str, Merged]) -> Callable[[Tensor], Root]:
        """Makes the piece's root in the unit of all: that of the piece with the largest columns so far."""

        def take(outputs: Tensor) -> Root:
            root = self.root(piece, outputs) if self._whole is None else self._whole
            taken.append(root)
            if self.unit is None:
                self.unit = root.unit
            if root.unit < self.unit:
                for each in merged.values():
                    each.rescale(root.unit / self.unit)
                self.unit = root.unit
            if root.unit == self.unit:
                return root
            column, factor = root.column, self.unit / root.unit
            return replace(root, column=lambda k: column(k) * factor, unit=self.unit)

        return take

    def _told(self, progress: Progress, piece: Piece) -> Progress:
        if not self.pieces.in_pieces():
            return progress
        examples = self.pieces.survey.examples

        def told(stage: str, item: str, done: int, total: int) -> None:
            part = (piece.start + piece.layouts.examples * done / total) / examples
            progress(stage, f"{piece.name}: {item}", round(1000 * part), 1000)

        return told


def _scaled(root: Root, share: float) -> Root:
    """The root of `share` times the loss."""
    column: Any = root.column
    variance, third = root.draw_moments
    return replace(
        root,
        column=lambda k: column(k) * share**0.5,
        gradient=root.gradient * share,
        draw_moments=(variance * share**2, third * share**3),
    )
