"""The whole network's part of an analysis: its steps and its evidence, as one stage around the layers' own measures."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

from curvscope.extract.choose import budget
from curvscope.extract.examples import Examples
from curvscope.extract.pieces import Pieces
from curvscope.graph.verify import Layouts
from curvscope.load.decay import kfac_damping, l2_decay
from curvscope.load.problem import Problem
from curvscope.measure import series, whole
from curvscope.measure.evidence import Likelihood, evidence_rows, likelihood
from curvscope.measure.network import Network
from curvscope.measure.ranges import own_dampings, with_joint
from curvscope.measure.room import Room, fitted, room_of
from curvscope.measure.wishes import Keep, keep_nothing
from curvscope.records import Layer, Row
from curvscope.settings import Settings


class NetworkStage:
    """Steps and evidence of the whole network.

    Steps are taken where they are estimated to cost less than `series.SHARE_OF_TIME` of --time, or are asked for;
    evidence where the size of the training set is given.

    Args:
        network: the loss on all data.
        problem: loss (its class axis settled) and optimizer.
        settings: the run's.
        fisher: how the loss Hessian's root is taken.
    """

    def __init__(self, network: Network, problem: Problem, settings: Settings, fisher: str) -> None:
        self.network = network
        self.problem = problem
        self.settings = settings
        self.fisher = fisher
        self.found: whole.WholeNetwork | None = None
        self.why_no_steps = "" if "steps" in settings.measure else _too_long(network, settings)
        if not self.why_no_steps or settings.dataset_size is not None:
            self.found = whole.begin(
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
        if self.found is None:
            steps, summaries = whole.no_steps(self.why_no_steps)
        else:
            steps, summaries = self.found.finish(own_dampings(layers))
            for layer in layers.values():
                layer.ranges = with_joint(layer.ranges, summaries)
        survey, targets = self.network.examples.pieces.survey, self.problem.targets
        found = likelihood(
            self.problem.loss,
            self.network.value,
            survey.terms,
            isinstance(targets, Tensor) and not targets.is_floating_point(),
            survey.examples,
            self.settings.dataset_size,
        )
        parts = [] if self.found is None else self.found.parts
        evidence = evidence_rows(parts, self.network.parameters, found, fisher=self.fisher)
        return {"steps": list(steps), "global_damping": list(summaries), "evidence": list(evidence)}


def no_tables(reason: str, fisher: str) -> dict[str, list[Row]]:
    """The same tables, not assessed for a reason."""
    steps, summaries = whole.no_steps(reason)
    evidence = evidence_rows([], {}, Likelihood(reason=reason), fisher=fisher)
    return {"steps": list(steps), "global_damping": list(summaries), "evidence": list(evidence)}


def open_network(pieces: Pieces, layouts: Layouts, settings: Settings) -> tuple[Network, Room]:
    """The loss on all data, in pieces that keep its passes to --memory, and what these may take.

    `layouts` are those of all data.
    """
    examples, room = fitted(Examples(pieces), room_of(pieces.graph, layouts, settings))
    return Network(pieces.graph, examples), room


def _too_long(network: Network, settings: Settings) -> str:
    """Why steps are left out by default: their estimated time, from a forward pass that is timed; empty if short."""
    start = time.perf_counter()
    network.loss()
    seconds = series.estimated_seconds(network.graph, time.perf_counter() - start, alone=network.examples.alone)
    if seconds <= series.SHARE_OF_TIME * settings.time_seconds:
        return ""
    return (
        f"they would take about {seconds:.2g} s, over {series.SHARE_OF_TIME:.0%} of --time {settings.time_seconds:g}: "
        "--measure steps takes them all the same"
    )
