"""The whole network's part of an analysis: its steps and its evidence, as one stage around the layers' own measures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from curvscope.extract.choose import budget
from curvscope.graph.functional import Graph
from curvscope.load.decay import kfac_damping, l2_decay
from curvscope.load.problem import Problem
from curvscope.measure import whole
from curvscope.measure.evidence import evidence_rows, likelihood
from curvscope.measure.layer import Keep, keep_nothing
from curvscope.measure.network import Network
from curvscope.measure.ranges import own_dampings, with_joint
from curvscope.records import Layer, Row
from curvscope.settings import Settings


class NetworkStage:
    """Steps and evidence of the whole network.

    Steps are taken where they are estimated to cost less than `whole.SHARE_OF_TIME` of --time, or are asked for;
    evidence where the size of the training set is given.

    Args:
        graph: the functional graph.
        tensors: the batch, flat.
        problem: loss (its class axis settled) and optimizer.
        targets: the batch's targets.
        examples: N.
        outputs: the model's outputs on the batch.
        settings: the run's.
        fisher: how the loss Hessian's root is taken.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Sequence[Tensor],
        problem: Problem,
        targets: Any,
        *,
        examples: int,
        outputs: Tensor,
        settings: Settings,
        fisher: str,
    ) -> None:
        self.fisher = fisher
        self.likelihood_of = (problem.loss, outputs, targets, examples, settings.dataset_size)
        self.found: whole.WholeNetwork | None = None
        network = Network(graph, tensors, problem.loss, targets)
        self.why_no_steps = "" if "steps" in settings.measure else _too_long(graph, network, settings)
        if not self.why_no_steps or settings.dataset_size is not None:
            self.found = whole.begin(
                graph,
                network,
                l2_decay(problem.optimizer),
                kfac_damping(problem, settings.damping),
                fisher=fisher,
                seed=settings.seed,
                memory_bytes=budget(settings),
                why_no_steps=self.why_no_steps,
            )

    @property
    def keep(self) -> Keep:
        """What takes each layer's share while it is measured."""
        return keep_nothing if self.found is None else self.found.keeper.keep

    def tables(self, layers: Mapping[str, Layer]) -> dict[str, list[Row]]:
        """The tables steps, global_damping and evidence; the layers' ranges get their column `joint`."""
        loss, outputs, targets, examples, dataset_size = self.likelihood_of
        if self.found is None:
            steps, summaries = whole.no_steps(self.why_no_steps)
            found = likelihood(loss, 0.0, outputs, targets, examples, dataset_size)
            return {
                "steps": list(steps),
                "global_damping": list(summaries),
                "evidence": list(evidence_rows([], {}, found, fisher=self.fisher)),
            }
        steps, summaries = self.found.finish(own_dampings(layers))
        for layer in layers.values():
            layer.ranges = with_joint(layer.ranges, summaries)
        value = self.found.objective.value
        found = likelihood(loss, value, outputs, targets, examples, dataset_size)
        parameters = self.found.objective.network.parameters
        return {
            "steps": list(steps),
            "global_damping": list(summaries),
            "evidence": list(evidence_rows(self.found.parts, parameters, found, fisher=self.fisher)),
        }


def _too_long(graph: Graph, network: Network, settings: Settings) -> str:
    """Why steps are left out by default: their estimated time, from a forward pass that is timed; empty if short."""
    start = time.perf_counter()
    network.loss()
    seconds = whole.estimated_seconds(graph, time.perf_counter() - start)
    if seconds <= whole.SHARE_OF_TIME * settings.time_seconds:
        return ""
    return (
        f"they would take about {seconds:.2g} s, over {whole.SHARE_OF_TIME:.0%} of --time {settings.time_seconds:g}: "
        "--measure steps takes them all the same"
    )
