"""A model as the `Network` and `Graph` that the whole-network measures work on, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from curvscope.graph.functional import Graph
from curvscope.graph.prepare import prepare
from curvscope.load import check_targets, load_problem
from curvscope.measure.network import Network
from curvscope.settings import Settings


def graph_and_network(model: nn.Module, inputs: Any, targets: Any, loss: Any) -> tuple[Graph, Network]:
    """The functional graph of the model and the network over it."""
    problem = load_problem(model, (inputs, targets), loss)
    prepared = prepare(problem, Settings(dtype="float64"), torch.device("cpu"), torch.float64)
    graph = prepared.graph
    tensors = [t.double() if t.is_floating_point() else t for t in prepared.flat.tensors]
    aims = problem.targets
    aims = aims.double() if aims.is_floating_point() else aims
    with torch.no_grad():
        settled = check_targets(problem.loss, graph.function({}, tensors), aims)
    return graph, Network(graph, tensors, settled, aims)
