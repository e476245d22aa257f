"""A debugger for curvature: how well K-FAC approximates the exact GGN, layer by layer.

`analyze` compares, `open` reads a saved run back, `capture` writes a bundle to analyze elsewhere. Importing
this package imports neither torch nor anything else that is slow; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from curvscope._version import __version__
from curvscope.errors import CurvscopeError

if TYPE_CHECKING:
    from curvscope.capturing import capture
    from curvscope.pipeline import analyze
    from curvscope.run import Run
    from curvscope.run import open_run as open

__all__ = ["CurvscopeError", "Run", "__version__", "analyze", "capture", "open"]

_HOMES = {
    "Run": ("curvscope.run", "Run"),
    "analyze": ("curvscope.pipeline", "analyze"),
    "capture": ("curvscope.capturing", "capture"),
    "open": ("curvscope.run", "open_run"),
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
