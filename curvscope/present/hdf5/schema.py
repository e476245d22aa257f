"""Where things stand in the file and how values become HDF5 types; shared by the writer and the reader."""

from __future__ import annotations

import dataclasses
import json
import typing
import zlib
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np

from curvscope.records import Row

FORMAT = "curvscope-run"
TIMING = "timing"
NOTES = "notes"
# HDF5 keeps checksums of its own metadata and of compressed data, but neither of strings nor of small arrays.
CHECKSUM = "crc32"
CHECKED = "crc32_of"
VALUES = "values_crc32"
# What tells whether and how the rest can be read stands outside the checksum of the file's own attributes.
UNCHECKED = frozenset({"format", "schema_version", "complete", CHECKSUM, CHECKED})

# Attributes that the writer puts beside a factor on its own account; all others come from Layer.attributes.
FACTOR_ATTRIBUTES = frozenset({"trace", "convention", "dimensions", "units", "flavour", "role", "source_dtype"}) | {
    CHECKSUM,
    CHECKED,
    VALUES,
}


class ChecksumError(ValueError):
    """Something in the file is not what was written."""


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


def checksum(value: Any) -> int:
    """CRC-32 of an array's bytes in C order, or of plain values written as JSON."""
    if isinstance(value, np.ndarray) and value.dtype.kind not in "OV":
        return zlib.crc32(np.ascontiguousarray(value).tobytes())
    return zlib.crc32(json.dumps(_plain_all(value)).encode())


def seal(attributes: h5py.AttributeManager) -> None:
    """Store a checksum over the attributes that are there now, and their names."""
    names = sorted(name for name in attributes if name not in UNCHECKED)
    attributes[CHECKED] = json.dumps(names)
    attributes[CHECKSUM] = checksum([attributes[name] for name in names])


def check_seal(attributes: h5py.AttributeManager, where: str) -> None:
    """Raise ChecksumError where sealed attributes are missing or changed; later ones are left alone."""
    names: Sequence[str] = json.loads(attributes[CHECKED])
    if checksum([attributes[name] for name in names]) != attributes[CHECKSUM]:
        raise ChecksumError(f"the checksum of the attributes of {where} does not match")


def _plain_all(value: Any) -> Any:
    """Nested lists of plain values; the void rows of a table become lists."""
    if isinstance(value, np.ndarray):
        return _plain_all(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain_all(item) for item in value]
    return plain(value)


def plain(value: Any) -> Any:
    """An attribute or cell as h5py gives it, as a plain Python value; arrays stay arrays."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.item() if isinstance(value, np.generic) else value
