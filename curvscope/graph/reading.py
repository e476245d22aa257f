"""Numbers that a model reads off its inputs, as `int(batch.max())` does: taken from one pass, given back in export.

An exported graph can't hold Python numbers that depend on data. Where a model reads some, and they are known not to
change, they are fixed at what they are on this batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

READS = (Tensor.item, Tensor.__int__, Tensor.__float__, Tensor.__bool__, Tensor.__index__, Tensor.tolist)


def numbers_read(run: Callable[[], Any]) -> list[Any]:
    """What the pass reads off tensors, in order."""
    with _Recorder() as recorder, torch.no_grad():
        run()
    return recorder.values


class Replayed(nn.Module):
    """A module whose passes read these numbers instead; shares the module's children and parameters."""

    def __init__(self, module: nn.Module, values: Sequence[Any]) -> None:
        super().__init__()
        self.__dict__["inner"] = module
        self.__dict__["values"] = tuple(values)
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = getattr(module, registry)

    def forward(self, *tensors: Tensor) -> Tensor:
        """The module's own output."""
        with _Player(self.__dict__["values"]):
            output: Tensor = self.__dict__["inner"](*tensors)
        return output


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.values: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in READS:
            self.values.append(result)
        return result


class _Player(TorchFunctionMode):
    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__()
        self.values = list(values)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            return self.values.pop(0)
        return func(*args, **(kwargs or {}))
