"""Models that can't be analyzed as they are, told apart before anything runs, and what to give instead."""

from __future__ import annotations

import torch
from torch import nn
from torch.ao.quantization import FakeQuantizeBase

from curvscope.errors import ModelError
from curvscope.load.state_dict import unwrap

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
# What is wrong, and what to do next.
Refusal = tuple[str, str]

SCRIPTED: Refusal = (
    "The model is TorchScript, whose operations can't be traced.",
    "Give the nn.Module that was scripted or traced; its weights are in model.state_dict().",
)
SHARDED: Refusal = (
    "The model is sharded over several processes: no process has all of its weights.",
    "Save a full state_dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) "
    "and analyze it with the unsharded model.",
)
QUANTIZED: Refusal = (
    "The model is quantized: its weights are integers, which have no gradient and no curvature.",
    "Analyze the floating-point model that it was made from, as it is before torch.ao.quantization.",
)
ROUNDING: Refusal = (
    "Every linear layer of the model rounds its weight as it runs (fake quantization), so it is not linear in it.",
    "Load the trained weights into the model as it is before torch.ao.quantization.prepare_qat (load_state_dict with "
    "strict=False: they have the same names), and analyze that.",
)
LAZY: Refusal = (
    "A lazy module has not seen an input yet: its parameter has no shape.",
    "Run one forward pass on a batch before the analysis; the modules then become plain ones.",
)
COMPLEX: Refusal = (
    "The model trains complex parameters, for which no GGN is defined here.",
    "Store the real and imaginary parts as one real parameter [..., 2] and use torch.view_as_complex of it in the "
    "forward pass; its exact block is then computed.",
)


def plain_model(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The model without the wrappers of torch.compile, DataParallel and DistributedDataParallel, and notes on those.

    Raises:
        ModelError: it is a TorchScript module, sharded (FSDP, DTensor), quantized (or all trained to be), or has
            complex or lazy parameters to train.
    """
    model, notes = unwrap(model)
    plain = any(type(module) in PLAIN for module in model.modules())
    for name, module in model.named_modules():
        refusal = _of_module(module)
        if refusal is None and not plain and isinstance(module, FakeQuantizeBase):
            refusal = ROUNDING
        if refusal is not None:
            kind = type(module)
            _refuse(refusal, f"{name or 'the model'}, a {kind.__name__} of {kind.__module__}")
    for name, parameter in model.named_parameters():
        refusal = _of_parameter(parameter)
        if refusal is not None:
            kind = type(parameter.data) if refusal is SHARDED else type(parameter)
            dtype = str(parameter.dtype).removeprefix("torch.")
            _refuse(refusal, f"parameter {name}, a {kind.__name__} of {dtype}")
    return model, notes


def _of_module(module: nn.Module) -> Refusal | None:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return SCRIPTED
    if kind.__name__ == "FullyShardedDataParallel":
        return SHARDED
    if ".quantized" in kind.__module__ and "torch" in kind.__module__:
        return QUANTIZED
    return None


def _of_parameter(parameter: nn.Parameter) -> Refusal | None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return LAZY
    if "DTensor" in (type(parameter).__name__, type(parameter.data).__name__):
        return SHARDED
    return COMPLEX if parameter.is_complex() and parameter.requires_grad else None


def _refuse(refusal: Refusal, where: str) -> None:
    what, remedy = refusal
    raise ModelError(what, where=where, remedy=remedy)
