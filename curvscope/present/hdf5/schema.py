"""Where things stand in the file and how values become HDF5 types; shared by the writer and the reader."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import h5py
import numpy as np

from curvscope.records import Row

FORMAT = "curvscope-run"
TIMING = "timing"
NOTES = "notes"

# Attributes that the writer puts beside a factor on its own account; all others come from Layer.attributes.
FACTOR_ATTRIBUTES = frozenset({"trace", "convention", "dimensions", "units", "flavour", "role", "source_dtype"})


def text(value: str) -> str:
    """A string that HDF5 can hold: valid UTF-8 and no NUL."""
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("\0", "\ufffd")


def row_dtype(row: type[Row]) -> np.dtype[Any]:
    """The compound type of a table's rows: the dataclass' fields, in order."""
    kinds = {str: h5py.string_dtype(), float: np.dtype("<f8"), int: np.dtype("<i8"), bool: np.dtype(bool)}
    return np.dtype([(name, kinds[kind]) for name, kind in field_types(row).items()])


def field_types(row: type[Any]) -> dict[str, type]:
    """Name to type (str, float, int or bool) of a dataclass' fields, in order."""
    hints = typing.get_type_hints(row)
    return {field.name: hints[field.name] for field in dataclasses.fields(row)}


def plain(value: Any) -> Any:
    """An attribute or cell as h5py gives it, as a plain Python value; arrays stay arrays."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.item() if isinstance(value, np.generic) else value
