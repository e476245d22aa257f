"""Reading a run back: tables at once, arrays when they are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import h5py
import numpy as np

from curvscope.errors import OutputError
from curvscope.present.hdf5 import schema
from curvscope.present.names import decode, encode
from curvscope.records import (
    SCHEMA_VERSION,
    TABLES,
    Array,
    ErrorRow,
    KroneckerFactors,
    Layer,
    LayerRow,
    ModelInfo,
    Run,
    RunInfo,
    SpectrumRow,
)

T = TypeVar("T")


def read(path: str | os.PathLike[str]) -> Run:
    """The run that `write` stored in `path`; bits of floats and arrays are those written.

    Tables are read now; factors, spectra, eigenvectors, columns and blocks when they are first used (the file
    stays open for as long as the run is held).

    Raises:
        OutputError: there is no such file, it is not a curvscope run, it is damaged or unfinished, or its
            schema has another major version.
    """
    file = _open(Path(path))
    _check_format(file, Path(path))
    try:
        tables = {name: _read_table(file, name) for name in TABLES}
        return Run(
            info=_from_attributes(RunInfo, file.attrs),
            model=_from_attributes(ModelInfo, file["model"].attrs),
            config=json.loads(file["config"].asstr()[()]),
            layers={row.name: _layer(file, row, tables) for row in tables["layers"]},
            tables=tables,
            notes=[str(note) for note in file[schema.NOTES].asstr()[()]] if schema.NOTES in file else [],
            seconds=_read_timing(file),
        )
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _damaged(Path(path), error) from error


def _open(path: Path) -> h5py.File:
    if not path.exists():
        raise OutputError(
            "There is no such file.", where=str(path), remedy="Make one with: curvscope analyze CHECKPOINT"
        )
    if path.is_dir():
        raise OutputError("That is a folder, not a run.", where=str(path), remedy="Name the .h5 file inside it.")
    try:
        # Runs are replaced whole and never changed in place, so that a lock would only get in the way.
        return h5py.File(path, "r", locking=False)
    except PermissionError as error:
        raise OutputError(
            "The file may not be read.", where=str(path), remedy="Change its permissions, or copy it."
        ) from error
    except OSError as error:
        if "truncated" in str(error):
            raise _damaged(path, error) from error
        raise OutputError(
            "That is not an HDF5 file.",
            where=str(path),
            remedy="Name the .h5 file that curvscope analyze wrote (for a checkpoint: curvscope analyze).",
        ) from error


def _check_format(file: h5py.File, path: Path) -> None:
    """Refuse what this version can't read, in words."""
    if schema.plain(file.attrs.get("format", "")) != schema.FORMAT:
        raise OutputError(
            "That is an HDF5 file, but not a curvscope run.",
            where=str(path),
            remedy="Name the .h5 file that curvscope analyze wrote.",
        )
    version = str(schema.plain(file.attrs.get("schema_version", "none")))
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        writer = schema.plain(file.attrs.get("curvscope_version", "unknown"))
        raise OutputError(
            f"The file has schema {version}; this curvscope reads {SCHEMA_VERSION.split('.')[0]}.x.",
            where=f"{path} (written by curvscope {writer})",
            remedy=f"Read it with curvscope {writer}, or make the run again.",
        )
    if not bool(file.attrs.get("complete", False)):
        raise OutputError(
            "The file is unfinished: its writer was stopped.",
            where=str(path),
            remedy="Make the run again: curvscope analyze CHECKPOINT --force",
        )


def _damaged(path: Path, error: BaseException) -> OutputError:
    return OutputError(
        f"The file is damaged or cut short: {error}",
        where=str(path),
        remedy="Copy it again from where it was made, or make the run again.",
    )


def _from_attributes(record: type[T], attributes: h5py.AttributeManager) -> T:
    """A record from the attributes of the same names; those it does not know are left alone."""
    return record(**{name: schema.plain(attributes[name]) for name in schema.field_types(record) if name in attributes})


def _read_table(file: h5py.File, name: str) -> list[Any]:
    """A table's rows; a column that a later minor version added is left alone."""
    dataset = file["tables"].get(name)
    if dataset is None:
        return []
    columns = [column for column in schema.field_types(TABLES[name]) if column in dataset.dtype.names]
    cells = [dataset[()][column].tolist() for column in columns]
    return [
        TABLES[name](**{column: schema.plain(cell) for column, cell in zip(columns, row, strict=True)})
        for row in zip(*cells, strict=True)
    ]


def _read_timing(file: h5py.File) -> dict[str, float]:
    if schema.TIMING not in file:
        return {}
    return {schema.plain(stage): float(seconds) for stage, seconds in file[schema.TIMING][()].tolist()}


def _layer(file: h5py.File, row: LayerRow, tables: dict[str, list[Any]]) -> Layer:
    group = file["layers"][encode(row.name)]
    return StoredLayer(
        group,
        row,
        errors={line.approximation: line for line in tables["errors"] if line.layer == row.name},
        spectra={line.approximation: line for line in tables["spectra"] if line.layer == row.name},
    )


class StoredLayer(Layer):
    """A layer whose arrays are read from its group when they are asked for."""

    def __init__(
        self,
        group: h5py.Group,
        row: LayerRow,
        errors: Mapping[str, ErrorRow],
        spectra: Mapping[str, SpectrumRow],
    ) -> None:
        self._group = group
        super().__init__(
            row,
            factors=LazyMapping(lambda: _factor_keys(group), lambda key: _factors(group, key)),
            spectrum=LazyMapping(lambda: _datasets(group, "spectrum"), lambda key: _array(group, f"spectrum/{key}")),
            eigenvectors=LazyMapping(
                lambda: _datasets(group, "eigenvectors"), lambda key: _array(group, f"eigenvectors/{key}")
            ),
            attributes=LazyMapping(lambda: list(_attributes(group)), lambda key: _attributes(group)[key]),
            errors=errors,
            spectra=spectra,
        )

    # Columns and blocks can be larger than everything else together: they are read anew rather than kept.
    @property
    def kept_columns(self) -> Array | None:
        """The stored columns, or None."""
        return _array(self._group, "columns") if "columns" in self._group else None

    @kept_columns.setter
    def kept_columns(self, value: Array | None) -> None:
        if value is not None:
            raise AttributeError("a stored layer can't be changed")

    @property
    def block(self) -> Array | None:
        """The stored block, or None."""
        return _array(self._group, "block") if "block" in self._group else None

    @block.setter
    def block(self, value: Array | None) -> None:
        if value is not None:
            raise AttributeError("a stored layer can't be changed")


class LazyMapping(Mapping[str, T], Generic[T]):
    """A mapping whose keys and values are read when they are asked for; a value that was read is kept."""

    def __init__(self, keys: Callable[[], list[str]], read_value: Callable[[str], T]) -> None:
        self._list_keys = keys
        self._read_value = read_value
        self._values: dict[str, T] = {}

    @cached_property
    def _keys(self) -> list[str]:
        return self._list_keys()

    def __getitem__(self, key: str) -> T:
        if key not in self._values:
            if key not in self._keys:
                raise KeyError(key)
            self._values[key] = self._read_value(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"<{', '.join(self._keys) or 'nothing'}: read when used>"


def _array(group: h5py.Group, name: str) -> Array:
    """One dataset's values.

    Raises:
        OutputError: its checksum does not match.
    """
    try:
        return np.asarray(group[name][()])
    except OSError as error:
        raise _damaged(Path(group.file.filename), error) from error


def _datasets(group: h5py.Group, folder: str) -> list[str]:
    """Paths of the datasets below a folder of a layer's group; empty if there is no such folder."""
    if folder not in group:
        return []
    names: list[str] = []
    group[folder].visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def _factor_paths(group: h5py.Group) -> dict[str, str]:
    """Key of Layer.factors ("expand", or "expand/<role>" of a tied weight) to the group of A and B."""
    paths = {path.rpartition("/")[0] for path in _datasets(group, "factors")}
    return {"/".join(decode(part) for part in path.split("/")): f"factors/{path}" for path in sorted(paths)}


def _factor_keys(group: h5py.Group) -> list[str]:
    return list(_factor_paths(group))


def _factors(group: h5py.Group, key: str) -> KroneckerFactors:
    path = _factor_paths(group)[key]
    flavour, _, role = key.partition("/")
    return KroneckerFactors(flavour, A=_array(group, f"{path}/A"), B=_array(group, f"{path}/B"), role=role)


def _attributes(group: h5py.Group) -> dict[str, Any]:
    """Layer.attributes: what the group holds beside its row, and the facts beside the factors."""
    row = schema.field_types(LayerRow)
    found = {name: schema.plain(value) for name, value in group.attrs.items() if name not in row}
    for key, path in _factor_paths(group).items():
        for side in ("A", "B"):
            for name, value in group[f"{path}/{side}"].attrs.items():
                if name not in schema.FACTOR_ATTRIBUTES:
                    found[f"{key}/{side}/{name}"] = schema.plain(value)
    return found
