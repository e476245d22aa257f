"""What the loading stage hands on: everything an analysis needs, and nothing about how it was stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Inputs:
    """The model's arguments: positional ones and keyword ones, tensors or plain values."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """The tensor arguments by name: "0", "1", ... for positional ones, the keyword for the others."""
        named = {str(i): value for i, value in enumerate(self.args)} | dict(self.kwargs)
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Batch:
    """The model's arguments, the targets, and where they came from."""

    inputs: Inputs
    targets: Any
    source: str


@dataclass(frozen=True)
class Loss:
    """A loss as trained.

    Attributes:
        name: cross_entropy, mse, bce_with_logits, or callable.
        settings: the options that change its value: reduction, weight, label_smoothing, ignore_index, pos_weight.
        function: `(outputs, targets) -> scalar tensor`, with the settings applied.
        label: what a report calls it, e.g. "cross_entropy(label_smoothing=0.1)".
    """

    name: str
    settings: Mapping[str, Any]
    function: Callable[[Tensor, Any], Tensor]
    label: str

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        """L itself, a scalar."""
        return self.function(outputs, targets)


@dataclass(frozen=True)
class Schedule:
    """The rates that a scheduler sets from here on.

    Attributes:
        name: the scheduler's class.
        rates: [steps + 1, groups], float64; row k holds the groups' learning rates after k more scheduler steps, row 0
            those of the optimizer's next step.
        momenta: momentum, or beta1, likewise; NaN where a group has none.
        problem: why no more is known of what lies ahead; empty where all is.
        assumed: row 1 is an assumption, which `problem` states, an unknown number of steps ahead.
        cut: the schedule goes on beyond the last row.
    """

    name: str
    rates: Tensor
    momenta: Tensor
    problem: str = ""
    assumed: bool = False
    cut: bool = False


@dataclass(frozen=True)
class OptimizerState:
    """A torch.optim optimizer as saved: class name, parameter names in its own order, its state_dict.

    `clip` is the bound on the gradient's norm where one is known, `schedule` what the scheduler will do where there is
    one, `notes` what else the checkpoint tells of the optimizer, a sentence each.
    """

    class_name: str
    param_names: tuple[str, ...]
    state_dict: Mapping[str, Any]
    clip: float | None = None
    notes: tuple[str, ...] = ()
    schedule: Schedule | None = None


@dataclass(frozen=True)
class Problem:
    """Model, batch, loss and optimizer, ready for the graph.

    Attributes:
        model: the user's own module (never written to), or the exported program of a bundle or archive.
        inputs: the model's arguments.
        targets: what the loss compares the outputs with.
        loss: the loss as trained.
        optimizer: the optimizer's state where the checkpoint has it.
        optimizer_options: what the user said of the optimizer; it comes before the state.
        source: file name or class name, for the report's header.
        name: the model's class name.
        example_axes: example axis by input name, where it is not 0.
        example_index: the name of the input that holds the graph of every node, for batches of graphs.
        step: the training step, where known.
        notes: what was done on the way (prefixes stripped, ...), one sentence each.
        hidden_by_eval: what the model does otherwise in training mode, a clause each.
        batches: where further batches come from; `inputs` and `targets` are those of the first. None: there is one.
    """

    model: nn.Module | torch.export.ExportedProgram
    inputs: Inputs
    targets: Any
    loss: Loss
    optimizer: OptimizerState | None = None
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    name: str = "model"
    example_axes: Mapping[str, int] = field(default_factory=dict)
    step: int | None = None
    notes: tuple[str, ...] = ()
    hidden_by_eval: tuple[str, ...] = ()
    example_index: str | None = None
    batches: Iterable[Batch] | None = None
