"""A run as one JSON document: everything but the arrays."""

from __future__ import annotations

import json
import math
from typing import Any

from curvscope.records import TABLES, Run, row_values


def dumps(run: Run) -> str:
    """The document: info, model, config, notes, seconds, and each table as a list of objects.

    NaN and infinities, which JSON lacks, are null; other floats keep their bits. Arrays (factors, spectra)
    are not in it. The text is ASCII, whatever the names are.
    """
    return json.dumps(document(run), indent=2, allow_nan=False)


def document(run: Run) -> dict[str, Any]:
    """What `dumps` writes, as plain dicts and lists."""
    return {
        **_finite(vars(run.info)),
        "model": _finite(vars(run.model)),
        "config": _finite(run.config),
        "notes": list(run.notes),
        "seconds": _finite(run.seconds),
        "tables": {name: [_finite(row_values(row)) for row in run.tables.get(name, [])] for name in TABLES},
    }


def _finite(value: Any) -> Any:
    """Containers as dicts and lists, numbers as Python's, what is not finite as None."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
