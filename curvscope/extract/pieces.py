"""The data of an analysis, handed out in pieces of examples: one batch or many, whole or cut to fit a memory bound.

Every sum over examples is a sum over pieces. `share` is what makes a piece's loss its part of the whole loss, see
`curvscope.load.reduction`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvscope.errors import BatchError, CurvscopeError, LossError
from curvscope.extract.cutting import can_split, outputs_of, take_targets
from curvscope.extract.footprint import bytes_an_example
from curvscope.extract.loaded import Loaded, Loader
from curvscope.extract.plan import ACTIVATIONS_SHARE
from curvscope.extract.shapes import Shapes, refusals, taken
from curvscope.extract.survey import Survey, averages_examples, looked_at
from curvscope.graph.passing import all_tokens, looked_up
from curvscope.graph.prepare import Prepared
from curvscope.graph.ragged import Ragged
from curvscope.graph.verify import Independent, Layouts
from curvscope.load.problem import Batch, Loss, Problem
from curvscope.load.reduction import denominator, has_terms

# Verifying the layouts holds about this many times what a pass over the same examples does.
VERIFYING = 3


@dataclass(frozen=True)
class Piece:
    """Some examples of one batch, ready to be swept.

    Attributes:
        name: what errors call the batch.
        tensors: the inputs, flat, on the device.
        targets: what the loss compares the outputs with.
        layouts: the verified layouts; `outputs` is empty.
        start: how many examples came before.
        share: `L = sum share L_piece`.
        counts: whether any term of the loss is in it; if none is, L_piece has no value.
    """

    name: str
    tensors: list[Tensor]
    targets: Any
    layouts: Layouts
    start: int
    share: float
    counts: bool = True


class Pieces:
    """All examples of all batches in pieces of at most `size` (None: whole batches); iterating reads them anew."""

    def __init__(self, problem: Problem, prepared: Prepared, device: torch.device, dtype: torch.dtype) -> None:
        self.loss = problem.loss
        self.graph = prepared.graph
        self.size: int | None = None
        self.many = problem.batches is not None
        self._prepared = prepared
        self._loader = Loader(prepared, device, dtype)
        self._first = Batch(problem.inputs, problem.targets, "the batch")
        self._batches: Iterable[Batch] = [self._first] if problem.batches is None else problem.batches
        self._shapes = Shapes(prepared.graph, prepared, self.many)
        self._survey: Survey | None = None
        self.example_bytes = 0
        self._divisible = True
        if self.many and prepared.index is not None:
            raise BatchError(
                "A batch of graphs is taken alone: which rows belong to which graph is established for one batch.",
                where=f"several batches, --example-index {prepared.index}",
                remedy="Join the graphs into one batch, or analyze the batches one by one.",
            )

    @property
    def device(self) -> torch.device:
        """Where the pieces are."""
        return self._loader.device

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the run's dtype."""
        return self._loader.dtype.itemsize

    @property
    def survey(self) -> Survey:
        """What `look` found."""
        assert self._survey is not None
        return self._survey

    def fit(self, budget: int) -> int | None:
        """Sets `size` so that a pass over a piece takes its share of `budget` bytes; how many examples to verify.

        None, and pieces as large as batches, where the graph takes one number of examples only.
        """
        loaded = self._loader.load(self._first)
        few = min(2, loaded.examples)
        if not self._prepared.any_size or loaded.examples == few:
            return None
        with refusals(loaded):
            self.example_bytes = bytes_an_example(self.graph, taken(loaded, 0, few), few)
        size = self._size_under(budget)
        if size >= loaded.examples and not self.many:
            return None
        self.size = size
        return max(2, size // VERIFYING)

    def _size_under(self, budget: int) -> int:
        return max(1, int(budget * ACTIVATIONS_SHARE) // max(1, self.example_bytes))

    def under(self, budget: int) -> Pieces:
        """The same data in the pieces that another budget allows; as they are where they were not cut by one."""
        if self.size is None or not self.example_bytes:
            return self
        size = self._size_under(budget)
        return self.sized(None if size >= self.survey.largest and not self.many else size)

    @property
    def largest(self) -> int:
        """The examples of the largest piece."""
        return self.survey.largest if self.size is None else min(self.size, self.survey.largest)

    def activations(self) -> int:
        """Bytes that a pass over the largest piece takes, where they were measured."""
        return self.example_bytes * self.largest

    def share(self) -> float:
        """The part of all examples that the largest piece holds; 0 where there is one piece, that has no copy."""
        return self.largest / self.survey.examples if self.in_pieces() else 0.0

    def verify(self, examples: int | None = None) -> Layouts:
        """The layouts of the first batch, with its outputs; of its first examples only where a number is given.

        Raises:
            LayoutError, ModelError, BatchError: see `curvscope.graph.verify`.
        """
        loaded = self._loader.load(self._first)
        count = loaded.examples if examples is None or not self._prepared.any_size else min(examples, loaded.examples)
        layouts = self._shapes.verify(loaded, count)
        if layouts.routed:
            self.size = None
            layouts = layouts if count == loaded.examples else self._shapes.verify(loaded, loaded.examples)
        return layouts

    def look(self, layouts: Layouts, seconds: float) -> Loss:
        """Surveys all batches; the loss comes back with its class axis settled.

        Args:
            layouts: of the first batch, as `verify` returned them.
            seconds: of a forward pass over the examples that these are of.

        Raises:
            BatchError, LossError: targets that do not suit the loss, with the batch they are in; no term counts in any.
        """
        self.loss, self._survey = looked_at(
            self._loaded(), self.loss, self._shapes, layouts, seconds, many=self.many, named=self.named
        )
        return self.loss

    def settle(self, layouts: Layouts) -> None:
        """For a callable loss: whether it adds or averages over examples.

        Raises:
            LossError: neither, or it can't be told, and there are several pieces.
        """
        if self.loss.name != "callable":
            return
        try:
            mean = averages_examples(
                self._loaded(), self.loss, self.graph, layouts, divides=self._divides, named=self.named
            )
        except LossError:
            if self.in_pieces():
                raise
            self._divisible = False
        else:
            if mean is not None:
                self._survey = replace(self.survey, total=float(self.survey.examples) if mean else 0.0)

    def tokens(self, layouts: Layouts) -> dict[str, Tensor]:
        """The rows of every embedding that the data looks up, by one more forward pass where there are pieces.

        From now on the layouts of all pieces say so. `layouts` are those of the first batch.
        """
        found = layouts.tokens
        if found and (self.in_pieces() or layouts.examples < self.survey.examples):
            for piece in self:
                with self.named(piece.name):
                    found = all_tokens(found, looked_up(self.graph, piece.tensors), self.graph)
        self._shapes.say(tokens=found)
        return found

    @property
    def axes(self) -> tuple[int | None, ...]:
        """The example axis of every input, None where it has none."""
        return self._prepared.axes

    def sized(self, size: int | None) -> Pieces:
        """The same data in pieces of another size, which may be halved without these."""
        other = copy.copy(self)
        other.size = size
        return other

    @property
    def can_pick(self) -> bool:
        """Whether the graph takes any number of examples, and the loss any part of them.

        Not where rows are routed: a part of a batch has its rows at other places.
        """
        return self._prepared.any_size and self._divisible and not self._shapes.routed

    def pick(self, piece: Piece, index: Tensor) -> Piece:
        """These examples of a piece alone, in this order; its share is still to be set.

        Raises:
            ValueError: they can't be taken out: rows of graphs, or targets that do not lie as the outputs do.
        """
        layouts, count = piece.layouts, piece.layouts.examples
        if isinstance(layouts.output, Ragged) or layouts.routed:
            raise ValueError("rows that are assigned for the whole batch alone")
        tensors = [
            tensor if axis is None else tensor.index_select(axis, index.to(tensor.device))
            for tensor, axis in zip(piece.tensors, self.axes, strict=True)
        ]
        targets = take_targets(self.loss, piece.targets, layouts, count, index)
        counts = has_terms(self.loss, targets)
        return replace(
            piece, tensors=tensors, targets=targets, layouts=replace(layouts, examples=len(index)), counts=counts
        )

    def weight(self, piece: Piece) -> float:
        """What a mean over the piece alone divides by; 1 for a sum."""
        if not self.survey.total:
            return 1.0
        if self.loss.name == "callable":
            return float(piece.layouts.examples)
        if not piece.counts:
            return 0.0
        return denominator(self.loss, outputs_of(piece.layouts, piece.layouts.examples), piece.targets)

    def apart(self, independent: Independent | None) -> None:
        """From now on the layouts say how positions are kept apart."""
        self._shapes.say(independent=independent)

    def halve(self) -> bool:
        """Makes pieces of half as many examples, where there are any smaller ones."""
        now = self.largest
        if now == 1 or not self.can_pick:
            return False
        self.size = now // 2
        return True

    def count(self) -> int:
        """About how many pieces there are: exactly, where batches are of one size."""
        survey = self.survey
        each = -(-survey.examples // survey.batches)
        return survey.batches * (1 if self.size is None else -(-each // min(self.size, each)))

    def in_pieces(self) -> bool:
        """Whether there is more than one piece."""
        return self.survey.batches > 1 or (self.size is not None and self.size < self.survey.examples)

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, read anew.

        Raises:
            BatchError: a batch can't be read or is another one than before.
        """
        survey, start = self.survey, 0
        for loaded in self._loaded():
            with self.named(loaded.name):
                layouts = self._shapes.of(loaded)
                step = loaded.examples
                if self.size is not None and self.size < step and self._divides(loaded, layouts):
                    step = self.size
            for low in range(0, loaded.examples, step):
                high = min(low + step, loaded.examples)
                yield self._piece(loaded, layouts, low, high, start + low, survey)
            start += loaded.examples

    def _piece(self, loaded: Loaded, layouts: Layouts, low: int, high: int, start: int, survey: Survey) -> Piece:
        count = high - low
        tensors, targets = loaded.tensors, loaded.targets
        if count < loaded.examples:
            tensors = taken(loaded, low, high)
            targets = take_targets(self.loss, loaded.targets, layouts, loaded.examples, slice(low, high))
        counts = has_terms(self.loss, targets)
        share = 1.0
        if survey.total and self.loss.name == "callable":
            share = count / survey.examples
        elif survey.total:
            share = denominator(self.loss, outputs_of(layouts, count), targets) / survey.total if counts else 0.0
        elif not counts:
            share = 0.0
        return Piece(loaded.name, tensors, targets, replace(layouts, examples=count), start, share, counts)

    def _loaded(self) -> Iterator[Loaded]:
        for batch in self._batches:
            with self.named(batch.source):
                loaded = self._loader.load(batch)
            yield loaded

    def _divides(self, loaded: Loaded, layouts: Layouts) -> bool:
        """Whether examples can be taken out of a batch: the graph takes any number, and targets follow the outputs."""
        return self._prepared.any_size and not layouts.routed and can_split(self.loss, loaded, layouts)

    @contextlib.contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Errors inside say which of several batches they are about."""
        try:
            yield
        except CurvscopeError as error:
            if self.many and name not in error.where:
                raise type(error)(error.what, where=f"{name}; {error.where}", remedy=error.remedy) from error
            raise
