"""The steps of the whole network that are tried, and what they cost in seconds and bytes."""

from __future__ import annotations

from curvscope.extract.cost import ASSUMED
from curvscope.graph.functional import Graph
from curvscope.graph.sites import LayerSpec
from curvscope.measure.parts import EXACT

SERIES = (
    ("kfac_expand", "eigenbasis"),
    ("kfac_reduce", "eigenbasis"),
    ("ekfac_expand", "eigenbasis"),
    ("ekfac_reduce", "eigenbasis"),
    (EXACT, "eigenbasis"),
    ("kfac_expand", "factored"),
    ("kfac_reduce", "factored"),
)
# Decades above the mean eigenvalue. The best step's damping is of the size of the network's largest eigenvalues, not
# of the mean: with fewer examples than parameters most eigenvalues are zero.
DECADES = range(-1, 6)
EXTRA_DECADES = 2
# Passes of the whole stage, in forward passes: per series 10 dampings with a product with J (three, and four more where
# its graph is not kept), 18 for the recommendation, 3 line searches of 8, 12 with a product for dampings of
# each layer's own.
FORWARD_PASSES = len(SERIES) * (10 * 4 + 18 + 24 + 12 * 4)
REBUILDING_PASSES = len(SERIES) * 22 * 4
STEPS_A_SERIES = 44
SHARE_OF_TIME = 0.2
# Tokens of a large vocabulary that a batch is taken to look up, for the estimates of time and memory.
TOKENS = 4096
SHARE_OF_MEMORY = 0.25


def estimated_seconds(graph: Graph, forward_seconds: float, *, alone: bool = True) -> float:
    """What the stage takes, from the seconds of one forward pass: the passes, and the products that make the steps.

    `alone` says that the data is one piece, whose graph is kept between products.
    """
    solves = sum(
        4.0 * spec.d_out * _inputs(spec) * (_inputs(spec) + spec.d_out // spec.groups)
        for spec in graph.chosen()
        if not spec.exact_only and not spec.roles
    )
    passes = FORWARD_PASSES + (0 if alone else REBUILDING_PASSES)
    return passes * forward_seconds + len(SERIES) * STEPS_A_SERIES * solves / ASSUMED.product64


def kept_bytes(graph: Graph, itemsize: int) -> int:
    """What is kept of all layers until the steps are taken: bases and right sides, and steps of the exact blocks."""
    nodes = 2 * (len(DECADES) + 1 + 2 * EXTRA_DECADES) + 1
    total = 0
    for spec in graph.chosen():
        d_in = _inputs(spec)
        bases = 0 if spec.exact_only or spec.roles else 2 * 8 * (spec.groups * d_in**2 + spec.d_out**2 // spec.groups)
        total += bases + spec.parameters * (4 * 8 + nodes * itemsize)
    return total


def _inputs(spec: LayerSpec) -> int:
    """The inputs that a layer's curvature runs over; of an embedding no more tokens than a batch is likely to have."""
    return min(spec.d_in, TOKENS) if spec.kind == "embedding" else spec.d_in + (spec.bias is not None)
