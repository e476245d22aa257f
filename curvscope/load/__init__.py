"""The loading stage: checkpoint, batch, loss and optimizer state, as one Problem."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvscope.errors import CheckpointError
from curvscope.load.batch import named_axes
from curvscope.load.batches import open_batches
from curvscope.load.bundle import bundle_batch
from curvscope.load.checkpoint import Checkpoint, load_checkpoint
from curvscope.load.eval_mode import eval_mode, hidden_by_eval
from curvscope.load.kinds import plain_model
from curvscope.load.loss import load_loss
from curvscope.load.optimizer import as_optimizer_state
from curvscope.load.optimizer_options import check_options, optimizer_options
from curvscope.load.problem import Batch, Problem
from curvscope.load.state_dict import Factory, build_model, check_weights
from curvscope.load.targets import CLASS_LOSSES, check_targets, class_indices

__all__ = ["check_targets", "check_weights", "load_problem"]


def load_problem(
    model: Any,
    batch: Any = None,
    loss: Any = None,
    *,
    optimizer: Any = None,
    factory: Factory | None = None,
    trust: bool = False,
    example_axes: Mapping[str, int] | Mapping[int, int] | None = None,
    example_index: str | int | None = None,
    step: int | None = None,
    scheduler: Any = None,
    clip_norm: float | None = None,
    batches: int | None = None,
) -> Problem:
    """Everything an analysis needs, from what the user gave.

    Args:
        model: an nn.Module or exported program, used as it is; or the path of a checkpoint.
        batch: `(inputs, targets)`, a batch file, "package.module:callable", or None for a bundle's own; or several
            batches, see `open_batches`.
        loss: a name with settings, a torch loss module, a callable, "package.module:callable", or None for a
            bundle's own.
        optimizer: a torch.optim optimizer; None takes the checkpoint's, which words such as "sgd:lr=0.1,momentum=0.9"
            or a mapping with the same keys correct or replace.
        factory: what builds the model of a state_dict, "package.module:name" or a callable.
        trust: allow files that can run code when read.
        example_axes: the example axis of an input by name or position, where it is not axis 0.
        example_index: the input, by name or position, that holds the graph of every node; None takes the bundle's.
        step: the training step; None takes the checkpoint's.
        scheduler: the learning rate scheduler of a live `optimizer`.
        clip_norm: the bound on the gradient's norm; it comes before the checkpoint's, 0 says that there is none.
        batches: how many of several batches to take, from the first on; None takes all.

    Raises:
        CheckpointError: the checkpoint can't be read, is not trusted, or does not fit its model.
        BatchError: the batch can't be read, is missing, empty, or not finite.
        LossError: the loss is missing or unknown.
        ModelError: weights that are NaN or Inf, or a model of a kind that can't be analyzed (see `plain_model`).
        UsageError: an optimizer that does not train this model, words that name none, or settings that the
            optimizer does not have. Words are looked at before anything is loaded.
    """
    said = isinstance(optimizer, (str, Mapping))
    options = optimizer_options(optimizer) if said else {}
    options |= optimizer_options({"clip_norm": clip_norm})
    found, source = _checkpoint(model, factory, trust)
    if isinstance(found.model, nn.Module):
        plain, notes = plain_model(found.model)
        found = dataclasses.replace(found, model=plain, notes=(*found.notes, *notes))
    check_weights(found.model)
    given = bundle_batch(found.bundle) if batch is None and found.bundle is not None else batch
    opened = open_batches(given, batches)
    own_loss = found.bundle.loss() if loss is None and found.bundle is not None else None
    chosen = load_loss(own_loss if loss is None else loss)
    module = found.model if isinstance(found.model, nn.Module) else None
    state = found.optimizer if optimizer is None or said else as_optimizer_state(optimizer, module, scheduler=scheduler)
    check_options(options, state)
    axes = named_axes(example_axes)
    index = None if example_index is None else str(example_index)
    if found.bundle is not None:
        bundle = found.bundle
        names = list(found.bundle.axes)
        index = found.bundle.index if index is None else index
        stored = {name: axis for name, axis in found.bundle.axes.items() if axis not in (None, 0)}
        axes = {**{name: axis for name, axis in stored.items() if axis is not None}, **axes}
        if module is None:

            def as_graph_takes_them(given: Batch) -> Batch:
                own = None if batch is None else given.inputs
                return dataclasses.replace(given, inputs=bundle.graph_inputs(own))

            opened = opened.changed(as_graph_takes_them)
            # the graph's inputs are positional, whatever their names were
            axes = {str(names.index(name)) if name in names else name: axis for name, axis in axes.items()}
            index = str(names.index(index)) if index in names else index

    if chosen.name in CLASS_LOSSES:
        opened = opened.changed(lambda given: dataclasses.replace(given, targets=class_indices(given.targets)))
    first = opened.first()
    return Problem(
        model=found.model,
        inputs=first.inputs,
        targets=first.targets,
        loss=chosen,
        optimizer=state,
        optimizer_options=options,
        source=source,
        name=found.name,
        example_axes=axes,
        example_index=index,
        step=found.step if step is None else step,
        notes=found.notes,
        hidden_by_eval=_hidden(found),
        batches=None if opened.held is not None else opened,
    )


def _hidden(found: Checkpoint) -> tuple[str, ...]:
    """What eval mode hides: from the model itself, or as the bundle remembers it."""
    remembered = None if found.bundle is None else found.bundle.mode
    if isinstance(found.model, nn.Module) or remembered is None:
        return hidden_by_eval(eval_mode(found.model))
    return hidden_by_eval(remembered)


def _checkpoint(model: Any, factory: Factory | None, trust: bool) -> tuple[Checkpoint, str]:
    if isinstance(model, (nn.Module, torch.export.ExportedProgram)):
        name = type(model).__name__
        return Checkpoint(model, name), name
    if isinstance(model, (str, os.PathLike)):
        path = Path(model)
        return load_checkpoint(path, factory, trust=trust), path.name
    if callable(model) and factory is None:
        built = build_model(model)
        return dataclasses.replace(Checkpoint(built, type(built).__name__)), type(built).__name__
    raise CheckpointError(
        f"A {type(model).__name__} is no model.",
        where="model",
        remedy="Give an nn.Module, or the path of a checkpoint.",
    )
