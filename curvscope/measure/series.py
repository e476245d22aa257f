"""The steps of the whole network that are tried, and what is kept for them in bytes."""

from __future__ import annotations

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
# Tokens of a large vocabulary that a batch is taken to look up, for the estimates of time and memory.
TOKENS = 4096
SHARE_OF_MEMORY = 0.25
# What limits steps and evidence by how the factors were made.
DRAWN = "factors made of draws: how far those of other draws would differ is not assessed"
FACTORS = {"empirical": "factors of the empirical Fisher", "probe": DRAWN, "mc": DRAWN}


def kept_bytes(graph: Graph, itemsize: int) -> int:
    """What is kept of all layers until the steps are taken: bases and right sides, and steps of the exact blocks."""
    nodes = 2 * (len(DECADES) + 1 + 2 * EXTRA_DECADES) + 1
    total = 0
    for spec in graph.chosen():
        d_in = inputs_of(spec)
        bases = 0 if spec.exact_only or spec.roles else 2 * 8 * (spec.groups * d_in**2 + spec.d_out**2 // spec.groups)
        total += bases + spec.parameters * (4 * 8 + nodes * itemsize)
    return total


def inputs_of(spec: LayerSpec) -> int:
    """The inputs that a layer's curvature runs over; of an embedding no more tokens than a batch is likely to have."""
    return min(spec.d_in, TOKENS) if spec.kind == "embedding" else spec.d_in + (spec.bias is not None)
