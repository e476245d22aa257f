"""One look at all batches: their sizes, what suits the loss and what it divides by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from curvscope.errors import BatchError
from curvscope.extract.cutting import outputs_of, take_targets, weighs_examples
from curvscope.extract.loaded import Loaded
from curvscope.extract.roots import exact_columns
from curvscope.extract.shapes import Shapes
from curvscope.graph.functional import Graph
from curvscope.graph.verify import Layouts
from curvscope.load import check_targets
from curvscope.load.problem import Loss
from curvscope.load.reduction import averages, denominator, has_terms

# Errors inside say which of several batches they are about.
Named = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Survey:
    """What one look at all batches tells: sizes for the plan, and what the loss divides by.

    Attributes:
        examples: N of all batches together.
        batches: how many there are.
        columns: K of the exact root, that of the batch that has most.
        positions: site -> most rows an example.
        total: what a mean divides by; 0 for a sum.
        terms: how many terms of a named loss count (with their class weights); 0 for a callable.
        seconds: of a forward pass over everything.
        largest: the examples of the largest batch.
    """

    examples: int
    batches: int
    columns: int
    positions: dict[str, int]
    total: float
    seconds: float
    largest: int
    terms: float = 0.0


def looked_at(
    batches: Iterable[Loaded],
    loss: Loss,
    shapes: Shapes,
    layouts: Layouts,
    seconds: float,
    *,
    many: bool,
    named: Named,
) -> tuple[Loss, Survey]:
    """The loss with its class axis settled, and the survey of all batches.

    Args:
        batches: all, in order.
        loss: as given.
        shapes: gives the layouts of every batch.
        layouts: of the first batch's first examples, with their outputs.
        seconds: of a forward pass over these examples.
        many: whether there may be several batches.
        named: see `Named`.

    Raises:
        BatchError, LossError: targets that do not suit the loss, with the batch they are in; no term counts in any.
    """
    examples, count, columns, terms, largest = 0, 0, 0, 0.0, 0
    positions: dict[str, int] = {}
    for loaded in batches:
        count += 1
        with named(loaded.name):
            known = shapes.of(loaded)
            outputs = outputs_of(known, loaded.examples)
            counts = has_terms(loss, loaded.targets) or not many
            if loss.name == "callable" and count == 1:
                check_targets(loss, layouts.outputs, targets_of(loss, loaded, layouts))
            elif loss.name != "callable" and counts:
                loss = check_targets(loss, outputs, loaded.targets)
                if many:
                    _check_weights(loss, known)
                terms += denominator(loss, outputs, loaded.targets)
            if counts:
                columns = max(columns, exact_columns(loss, outputs, known.output, loaded.targets))
        examples, largest = examples + loaded.examples, max(largest, loaded.examples)
        for site, rows in known.positions.items():
            positions[site] = max(positions.get(site, 0), rows)
    if columns == 0 and many:
        raise BatchError(
            "No batch has a target that counts: the loss has no term.",
            where="targets of all batches",
            remedy="Check ignore_index and the class weights against the targets.",
        )
    total = terms if loss.settings.get("reduction") == "mean" else 0.0
    each = seconds / layouts.examples
    return loss, Survey(examples, count, columns, positions, total, each * examples, largest, terms)


def averages_examples(
    batches: Iterable[Loaded],
    loss: Loss,
    graph: Graph,
    layouts: Layouts,
    *,
    divides: Callable[[Loaded, Layouts], bool],
    named: Named,
) -> bool | None:
    """Whether a callable loss averages over the examples (or adds); None where one batch is all and stays whole.

    Two parts of the first batch tell where it can be cut, else the first two batches.

    Raises:
        LossError: neither, or it can't be told.
    """
    outputs, layout = layouts.outputs, layouts.output
    first: tuple[Tensor, Any, int] | None = None
    for loaded in batches:
        if first is None:
            part = targets_of(loss, loaded, layouts)
            if layouts.examples > 1 and divides(loaded, layouts):
                low = max(1, layouts.examples // 3)
                cuts = [(0, low), (low, layouts.examples)]
                parts = [
                    (
                        layout.take(outputs, *cut),
                        take_targets(loss, loaded.targets, layouts, loaded.examples, slice(*cut)),
                        cut[1] - cut[0],
                    )
                    for cut in cuts
                ]
                return averages(loss, parts, (outputs, part))
            first = (outputs, part, loaded.examples)
            continue
        with torch.no_grad(), named(loaded.name):
            more = graph.run(*loaded.tensors)
        joined = torch.cat([outputs, more], dim=layout.axis)
        both = pytree.tree_map(
            lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) and a.ndim else a, first[1], loaded.targets
        )
        return averages(loss, [first, (more, loaded.targets, loaded.examples)], (joined, both))
    return None


def targets_of(loss: Loss, loaded: Loaded, layouts: Layouts) -> Any:
    """The targets of the examples that the layouts' outputs are of."""
    if layouts.examples >= loaded.examples:
        return loaded.targets
    return take_targets(loss, loaded.targets, layouts, loaded.examples, slice(0, layouts.examples))


def _check_weights(loss: Loss, layouts: Layouts) -> None:
    """Refuse weights of single examples where there are several batches.

    Raises:
        BatchError: a weight of bce_with_logits has an axis of examples.
    """
    if weighs_examples(loss, layouts):
        raise BatchError(
            "The loss has weights for each example of one batch, and there are several batches.",
            where=f"loss {loss.label}",
            remedy="Give weights of outputs only, or one batch.",
        )
