"""Models that can't be analyzed as they are, told apart before anything runs, and what to give instead."""

from __future__ import annotations

import torch
from torch import nn

from curvscope.errors import ModelError
from curvscope.load.state_dict import unwrap


def plain_model(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The model without the wrappers of torch.compile, DataParallel and DistributedDataParallel, and notes on those.

    Raises:
        ModelError: it is a TorchScript module, sharded (FSDP, DTensor) or quantized, or has complex or lazy parameters
            to train.
    """
    model, notes = unwrap(model)
    _check_scripted(model)
    _check_sharded(model)
    _check_quantized(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(
                "A lazy module has not seen an input yet: its parameter has no shape.",
                where=f"parameter {name}",
                remedy="Run one forward pass on a batch before the analysis; the modules then become plain ones.",
            )
        if parameter.is_complex() and parameter.requires_grad:
            raise ModelError(
                f"The model trains complex parameters ({str(parameter.dtype).removeprefix('torch.')}), for which no "
                "GGN is defined here.",
                where=f"parameter {name}",
                remedy="Store the real and imaginary parts as one real parameter [..., 2] and use "
                "torch.view_as_complex of it in the forward pass; its exact block is then computed.",
            )
    return model, notes


def _check_scripted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                "The model is TorchScript, whose operations can't be traced.",
                where=f"{name or 'the model'}, a {type(module).__name__}",
                remedy="Give the nn.Module that was scripted or traced; its weights are in model.state_dict().",
            )


def _check_sharded(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            _refuse_sharded(f"{name or 'the model'}, a FullyShardedDataParallel")
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor" or type(parameter).__name__ == "DTensor":
            _refuse_sharded(f"parameter {name}, a DTensor")


def _refuse_sharded(where: str) -> None:
    raise ModelError(
        "The model is sharded over several processes: no process has all of its weights.",
        where=where,
        remedy="Save a full state_dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
        "full_state_dict=True) and analyze it with the unsharded model.",
    )


def _check_quantized(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if ".quantized" in type(module).__module__ and "torch" in type(module).__module__:
            raise ModelError(
                "The model is quantized: its weights are integers, which have no gradient and no curvature.",
                where=f"{name or 'the model'}, a {type(module).__name__} of {type(module).__module__}",
                remedy="Analyze the model as it is before torch.ao.quantization.convert: the trained floating-point "
                "weights, with their fake quantization if there is any.",
            )
