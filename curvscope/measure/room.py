"""What of --memory the stages over the whole network may take, and the pieces that keep them to it.

Three things are held at once: the graph of a product (forward pass and gradient, both to be differentiated), the
iteration's basis or what the steps keep of every layer, and a few vectors of all parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from curvscope.extract.choose import DTYPES, standing, usable
from curvscope.extract.examples import Examples
from curvscope.extract.footprint import Stored
from curvscope.extract.pieces import Piece
from curvscope.graph.functional import Graph
from curvscope.graph.verify import Layouts
from curvscope.measure.network import differentiable
from curvscope.measure.series import SHARE_OF_MEMORY, kept_bytes
from curvscope.settings import Settings

BASIS_BYTES = 256 * 2**20
SHARE_OF_BASIS = 1 / 4
# Vectors of all parameters beside the basis, in float64: gradient, step or image, and what P^{-1/2} holds.
VECTORS = 6
# Passes get this share at least: with less there would be no use in a larger bound.
LEAST_SHARE = 1 / 8
# What a pass really takes in units of what is counted: buffers of single operations, and memory that is freed too late.
# A product with H took 1.5 (mlp), 1.8 (resnet), 1.6 (vit) and 2.0 (gpt) of the benchmarks' count, vectors aside.
SLACK = 2.0
# Graphs of the batch and of both halves, kept side by side.
WITH_HALVES = 2


@dataclass(frozen=True)
class Room:
    """What the stages over the whole network are to keep to.

    Attributes:
        passes: bytes that graphs may take.
        basis: bytes that the basis of an iteration may take.
        together: whether the graphs of all examples and of both halves may be kept side by side.
    """

    passes: int
    basis: int
    together: bool = True


def room_of(graph: Graph, layouts: Layouts, settings: Settings) -> Room:
    """The bytes for graphs and bases: what factors, kept steps and vectors leave of what can be planned with."""
    whole = usable(settings)
    trained = sum(p.numel() for name, p in graph.parameters.items() if graph.requires_grad[name])
    basis = int(min(BASIS_BYTES, SHARE_OF_BASIS * whole))
    steps = kept_bytes(graph, DTYPES[settings.dtype].itemsize)
    beside = max(basis, steps if steps <= SHARE_OF_MEMORY * whole else 0)
    left = whole - standing(graph, layouts, settings) - beside - VECTORS * 8 * trained
    return Room(max(left, int(LEAST_SHARE * whole)), basis)


def fitted(examples: Examples, room: Room) -> tuple[Examples, Room]:
    """The examples in pieces whose graphs fit, and whether those of the halves fit beside them.

    Whole batches where the graph takes no other number of examples, or the loss can't be cut up.
    """
    whole = replace(examples, pieces=examples.pieces.sized(None))
    found = pass_bytes(whole)
    if found is None:
        return whole, room
    once, each = (int(SLACK * part) for part in found)
    largest = examples.pieces.survey.largest
    together = once + WITH_HALVES * each * largest <= room.passes
    size = max(1, (room.passes - once) // max(1, each))
    if size < largest:
        even = -(-largest // -(-largest // size))  # as many pieces, of one size
        whole = replace(examples, pieces=examples.pieces.sized(even))
    return whole, replace(room, together=together)


def pass_bytes(examples: Examples) -> tuple[int, int] | None:
    """Bytes of a product's graph: what does not depend on the number of examples, and what each of them adds.

    Measured on one and on three examples: what autograd saves in a forward pass and in the gradient's, and the
    gradients under way in the pass through both. None where examples can't be taken out of a batch.
    """
    pieces = examples.pieces
    if not pieces.can_pick or pieces.survey.largest == 1:
        return None
    piece = next(iter(examples))
    few = min(3, piece.layouts.examples)
    if few == 1:
        return 0, _graph_bytes(pieces.graph, piece)
    try:
        parts = [pieces.pick(piece, torch.arange(count)) for count in (1, few)]
    except ValueError:
        return None
    one, more = (_graph_bytes(pieces.graph, part) for part in parts)
    each = max(0, more - one) // (few - 1)
    return max(0, one - each), each


def _graph_bytes(graph: Graph, piece: Piece) -> int:
    parameters = {name: p.detach() for name, p in graph.parameters.items() if graph.requires_grad[name]}
    stored = Stored(graph)
    with torch.enable_grad(), stored.watched():
        fresh = {name: p.requires_grad_() for name, p in parameters.items()}
        outputs = differentiable(graph, fresh, piece.tensors)
        # dL/df in place of a loss's own graph, which is small beside the model's
        dummy = torch.ones_like(outputs, requires_grad=True)
        torch.autograd.grad(outputs, list(fresh.values()), dummy, create_graph=True, allow_unused=True)
    return stored.total()
