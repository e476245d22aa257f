"""torchvision's models where its compiled operators do not fit the installed torch.

Built for another torch (a CUDA build beside a CPU one), torchvision fails on import, because it registers fake kernels
for operators that its extension was to define. None of its classifiers uses them: their schemas suffice.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


@cache
def torchvision_models() -> ModuleType:
    """`torchvision.models`; the operators it misses are declared, not implemented, first."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare()
    return importlib.import_module("torchvision.models")


@cache
def _declare() -> torch.library.Library:
    """The declarations last as long as the library object, which the cache keeps."""
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    return library
