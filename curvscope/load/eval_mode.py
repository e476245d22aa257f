"""What a model does differently in eval mode, in which everything is computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

WORDS = {
    "batch_norm": "BatchNorm uses its running statistics",
    "batch_statistics": "BatchNorm keeps no running statistics and uses the batch's own",
    "dropout": "dropout is off",
}


def eval_mode(model: nn.Module | torch.export.ExportedProgram) -> dict[str, bool]:
    """Which of `WORDS` hold for the model.

    An exported program tells less than its module: in eval mode it has no dropout nodes.
    """
    if not isinstance(model, nn.Module):
        names = {str(node.target) for node in model.graph.nodes}
        return {
            "batch_norm": any("batch_norm" in name for name in names),
            "batch_statistics": False,
            "dropout": any("dropout" in name for name in names),
        }
    modules = list(model.modules())
    norms = [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return {
        "batch_norm": any(norm.running_mean is not None for norm in norms),
        "batch_statistics": any(norm.running_mean is None for norm in norms),
        "dropout": any(_drops(module) for module in modules),
    }


def hidden_by_eval(mode: Mapping[str, bool]) -> tuple[str, ...]:
    """The words for what `eval_mode` found."""
    return tuple(words for key, words in WORDS.items() if mode.get(key))


def _drops(module: nn.Module) -> bool:
    """Whether the module itself drops anything in training mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    return isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1
