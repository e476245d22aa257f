"""The examples that the whole network is evaluated on: all of the data, or a half of it, in pieces that fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvscope.extract.pieces import Piece, Pieces
from curvscope.load.problem import Loss


@dataclass(frozen=True)
class Examples:
    """Some examples, read anew each time they are iterated over; the pieces' shares make up the loss on them.

    Attributes:
        pieces: all data, cut to a size of its own.
        order: the numbers of the examples over all data; None: all of them.
        total: what a mean over them divides by.
        twice: every example is taken twice, for graphs that take one number of examples only.
    """

    pieces: Pieces
    order: Tensor | None = None
    total: float = 0.0
    twice: bool = False

    @property
    def loss(self) -> Loss:
        """The loss as trained."""
        return self.pieces.loss

    @property
    def count(self) -> int:
        """How many examples."""
        return self.pieces.survey.examples if self.order is None else len(self.order)

    @property
    def alone(self) -> bool:
        """Whether they are one piece, which may be held."""
        return not self.pieces.in_pieces()

    def __iter__(self) -> Iterator[Piece]:
        for piece in self.pieces:
            if self.order is None:
                yield piece
                continue
            found = self._of(piece)
            if found is not None:
                share = 1.0 if self.alone or not self.total else self.pieces.weight(found) / self.total
                yield replace(found, share=share if found.counts else 0.0)

    def halve(self) -> bool:
        """Makes pieces of half as many examples, here and in all parts, where there are any smaller ones."""
        return self.pieces.halve()

    def halves(self, seed: int, *, twice: bool = False) -> tuple[Examples, Examples]:
        """A random half of all examples and its complement.

        They depend on the seed and N alone, not on how the data is cut into batches and pieces. Where there are several
        pieces, one reading tells what a mean over each half divides by.

        Raises:
            ValueError: examples can't be taken out, see `Pieces.pick`.
        """
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))
        cuts = order[: self.count // 2], order[self.count // 2 :]
        first, second = (replace(self, order=cut, twice=twice) for cut in cuts)
        if self.alone or not self.pieces.survey.total:
            return first, second
        totals = [0.0, 0.0]
        for piece in self.pieces:
            for number, half in enumerate((first, second)):
                found = half._of(piece)
                totals[number] += 0.0 if found is None else self.pieces.weight(found)
        return replace(first, total=totals[0]), replace(second, total=totals[1])

    def _of(self, piece: Piece) -> Piece | None:
        """Those of one piece; None where there are none."""
        assert self.order is not None
        start, stop = piece.start, piece.start + piece.layouts.examples
        index = self.order[(self.order >= start) & (self.order < stop)] - start
        if len(index) == 0:
            return None
        return self.pieces.pick(piece, torch.cat([index, index]) if self.twice else index)
