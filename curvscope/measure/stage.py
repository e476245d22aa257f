"""The whole network's part of an analysis: its steps and its evidence, as one stage around the layers' own measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from curvscope.extract.choose import DTYPES, budget
from curvscope.extract.examples import Examples
from curvscope.extract.plan import size_in_words
from curvscope.extract.ready import Ready
from curvscope.load.decay import kfac_damping, l2_decay
from curvscope.load.problem import Problem
from curvscope.measure import whole
from curvscope.measure.begin import begin
from curvscope.measure.effort import SHARE_OF_TIME, Effort, steps_seconds, timed_effort, why_too_long
from curvscope.measure.evidence import Likelihood, evidence_rows, likelihood
from curvscope.measure.network import Network
from curvscope.measure.ranges import own_dampings, with_joint
from curvscope.measure.room import Room, fitted, room_of
from curvscope.measure.series import SHARE_OF_MEMORY, kept_bytes
from curvscope.measure.wishes import Keep, keep_nothing
from curvscope.records import Layer, Row
from curvscope.settings import Settings


class NetworkStage:
    """Steps and evidence of the whole network; the latter where the size of the training set is given.

    Args:
        opened: the network, and whether steps are taken.
        problem: loss (its class axis settled) and optimizer.
        settings: the run's.
        fisher: how the loss Hessian's root is taken.
    """

    def __init__(self, opened: Opened, problem: Problem, settings: Settings, fisher: str) -> None:
        network = opened.network
        self.network = network
        self.problem = problem
        self.settings = settings
        self.fisher = fisher
        self.found: whole.WholeNetwork | None = None
        self.why_no_steps = opened.why_no_steps
        if not self.why_no_steps or settings.dataset_size is not None:
            self.found = begin(
                network,
                l2_decay(problem.optimizer),
                kfac_damping(problem, settings.damping),
                fisher=fisher,
                seed=settings.seed,
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
            layer.ranges = with_joint(layer.ranges, summaries, {} if self.found is None else self.found.withheld)
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


def no_tables(reason: str, fisher: str, layers: Mapping[str, Layer]) -> dict[str, list[Row]]:
    """The same tables, not assessed for a reason, which the layers' ranges get, too."""
    steps, summaries = whole.no_steps(reason)
    for layer in layers.values():
        layer.ranges = with_joint(layer.ranges, summaries, {})
    evidence = evidence_rows([], {}, Likelihood(reason=reason), fisher=fisher)
    return {"steps": list(steps), "global_damping": list(summaries), "evidence": list(evidence)}


@dataclass(frozen=True)
class Opened:
    """The whole network, ready for its stages.

    Attributes:
        network: the loss on all data, in pieces that keep its passes to --memory.
        room: what these may take.
        effort: what they take in seconds.
        steps_seconds: what steps would take, taken or not.
        why_no_steps: why none are taken; empty where they are.
    """

    network: Network
    room: Room
    effort: Effort
    steps_seconds: float
    why_no_steps: str


def open_network(ready: Ready) -> tuple[Ready, Opened]:
    """The network, and the plan with what is kept for its steps: in a run and in a dry run alike.

    By default steps are taken where they are estimated to cost less than `effort.SHARE_OF_TIME` of --time and what
    they keep of the layers costs none of these anything.
    """
    settings, passes = ready.settings, ready.passes
    examples, room = fitted(Examples(passes.pieces), room_of(passes.graph, ready.layouts, settings))
    network = Network(passes.graph, examples)
    asked = "steps" in settings.measure
    effort = timed_effort(network, float("inf") if asked else SHARE_OF_TIME * settings.time_seconds)
    seconds = steps_seconds(network, effort, ready.fisher)
    why = why_too_long(seconds, settings)
    count = kept_bytes(passes.graph, DTYPES[settings.dtype].itemsize)
    if not why and count > SHARE_OF_MEMORY * budget(settings):
        why = f"what steps need of every layer, {size_in_words(count)}, exceeds a quarter of what there is"
    elif not why:
        reserved = ready.reserving(count)
        if reserved is None:
            why = f"what steps need of every layer, {size_in_words(count)}, does not fit beside the columns"
        ready = reserved or ready
    if why.startswith("what steps need"):
        enough = ready.bound_reserving(count, SHARE_OF_MEMORY)
        why += f" under --memory {size_in_words(budget(settings))}" + (
            f": {size_in_words(enough)} would do" if enough else ""
        )
    return ready, Opened(network, room, effort, seconds, why)
