"""What embeddings do beside looking rows up: scale them down in place, and divide their gradients.

With `max_norm` a forward pass first scales the rows that it looks up down to this norm, in the weight itself. After one
pass over all the data these rows are as every further pass leaves them; the others stay as they are stored, and matter
where a head shares the weight. With `scale_grad_by_freq` a backward pass divides a row's gradient by how often the row
was looked up, which is the gradient of no loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LOOKUPS = (torch.ops.aten.embedding.default, torch.ops.aten.embedding_bag.padding_idx)
# Where these operations take scale_grad_by_freq.
DIVIDES = 3


def rescaling(model: nn.Module) -> list[Any]:
    """The embeddings with `max_norm`."""
    lookups = (nn.Embedding, nn.EmbeddingBag)
    return [module for module in model.modules() if isinstance(module, lookups) and module.max_norm is not None]


def settle(twin: nn.Module) -> None:
    """Lets no embedding of a shadow rescale rows any more, once the rows that occur have been rescaled."""
    for module in rescaling(twin):
        module.max_norm = None


def lookup_notes(model: nn.Module | torch.export.ExportedProgram) -> tuple[str, ...]:
    """Says so where a forward pass changes rows of a table, or a backward pass their gradients."""
    notes = []
    if isinstance(model, nn.Module):
        changed = {id(module) for module in rescaling(model)}
        rescaled = [name for name, module in model.named_modules() if id(module) in changed]
        divided = [name for name, module in model.named_modules() if getattr(module, "scale_grad_by_freq", False)]
        if rescaled:
            notes.append(
                f"max_norm: the rows of {', '.join(rescaled)} that the batch looks up are scaled down first, as the "
                "forward pass does; the others are as they are stored."
            )
    else:
        divided = _divided(model)
    if divided:
        notes.append(
            f"scale_grad_by_freq: training divides the gradient of {', '.join(divided)} by how often the batch looks "
            "each row up, which is the gradient of no loss; gradient, curvature and verdicts here are the loss's."
        )
    return tuple(notes)


def _divided(program: torch.export.ExportedProgram) -> list[str]:
    """The tables whose gradients a program divides."""
    parameters = program.graph_signature.inputs_to_parameters
    nodes = [node for node in program.graph.nodes if node.target in LOOKUPS and node.args[DIVIDES:][:1] == (True,)]
    return [parameters.get(node.args[0].name, node.args[0].name).removesuffix(".weight") for node in nodes]
