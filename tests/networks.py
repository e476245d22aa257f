"""A model as the `Network` and `Graph` that the whole-network measures work on, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from curvscope.extract.examples import Examples
from curvscope.extract.pieces import Pieces
from curvscope.graph.functional import Graph
from curvscope.graph.prepare import prepare, varying_axes
from curvscope.load import load_problem
from curvscope.load.problem import Problem
from curvscope.measure.network import Network
from curvscope.settings import Settings


def graph_and_network(model: nn.Module, batch: Any, targets: Any, loss: Any, **options: Any) -> tuple[Graph, Network]:
    """The functional graph of the model and the network over it."""
    examples = all_examples(load_problem(model, (batch, targets), loss, **options))
    return examples.pieces.graph, Network(examples.pieces.graph, examples)


def all_examples(problem: Problem, size: int | None = None) -> Examples:
    """All data of a problem, in pieces of that size."""
    kind = torch.float64
    prepared = prepare(problem, Settings(dtype="float64"), torch.device("cpu"), kind, varying_axes(problem))
    pieces = Pieces(problem, prepared, torch.device("cpu"), kind)
    layouts = pieces.verify()
    pieces.look(layouts, 0.0)
    pieces.settle(layouts)
    return Examples(pieces.sized(size))
