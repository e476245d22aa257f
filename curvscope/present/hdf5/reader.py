"""Reading a run back: tables at once, arrays when they are asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import h5py
import numpy as np

from curvscope.errors import OutputError
from curvscope.present.hdf5 import schema
from curvscope.present.hdf5.heap import sound_heaps
from curvscope.present.names import decode, encode
from curvscope.records import (
    SCHEMA_VERSION,
    TABLES,
    Array,
    DampingRow,
    ErrorRow,
    ExampleRow,
    KroneckerFactors,
    Layer,
    LayerRow,
    ModelInfo,
    RangeRow,
    Run,
    RunInfo,
    SourceRow,
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
    # h5py tells of damage by whatever exception its reading runs into
    try:
        _check_format(file, Path(path))
        schema.check_seal(file.attrs, "the file")
        schema.check_seal(file["model"].attrs, "model")
        tables = {name: _read_table(file, name) for name in TABLES}
        return Run(
            info=_from_attributes(RunInfo, file.attrs),
            model=_from_attributes(ModelInfo, file["model"].attrs),
            config=json.loads(schema.plain(_values(file["config"]))),
            layers={row.name: _layer(file, row, tables) for row in tables["layers"]},
            tables=tables,
            notes=[schema.plain(note) for note in _values(file[schema.NOTES])],
            seconds=_read_timing(file),
        )
    except OutputError:
        file.close()
        raise
    except Exception as error:
        file.close()
        raise _damaged(Path(path), error) from error


def _values(dataset: h5py.Dataset) -> Any:
    """A dataset's values, compared with the checksum they were written with."""
    values = dataset[()]
    if schema.checksum(values) != dataset.attrs[schema.VALUES]:
        raise schema.ChecksumError(f"the checksum of {dataset.name} does not match")
    return values


def _open(path: Path) -> h5py.File:
    if not path.exists():
        raise OutputError(
            "There is no such file.", where=str(path), remedy="Make one with: curvscope analyze CHECKPOINT"
        )
    if path.is_dir():
        raise OutputError("That is a folder, not a run.", where=str(path), remedy="Name the .h5 file inside it.")
    try:
        if not sound_heaps(path):
            raise _damaged(path, schema.ChecksumError("its strings do not end where they should"))
        try:
            # a process that opens a file twice has to say the same of locking: h5py's default is what others say
            return h5py.File(path, "r")
        except BlockingIOError:
            # Runs are replaced whole and never changed in place, so that somebody's lock says nothing.
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
    dataset = file["tables"][name]
    columns = [column for column in schema.field_types(TABLES[name]) if column in dataset.dtype.names]
    values = _values(dataset)
    cells = [values[column].tolist() for column in columns]
    return [
        TABLES[name](**{column: schema.plain(cell) for column, cell in zip(columns, row, strict=True)})
        for row in zip(*cells, strict=True)
    ]


def _read_timing(file: h5py.File) -> dict[str, float]:
    return {schema.plain(stage): float(seconds) for stage, seconds in _values(file[schema.TIMING]).tolist()}


def _layer(file: h5py.File, row: LayerRow, tables: dict[str, list[Any]]) -> Layer:
    group = file["layers"][encode(row.name)]
    schema.check_seal(group.attrs, f"layer {row.name}")
    return StoredLayer(
        group,
        row,
        errors={line.approximation: line for line in tables["errors"] if line.layer == row.name},
        spectra={line.approximation: line for line in tables["spectra"] if line.layer == row.name},
        sources={line.approximation: line for line in tables["sources"] if line.layer == row.name},
        examples=[line for line in tables["examples"] if line.layer == row.name],
        damping=[line for line in tables["damping"] if line.layer == row.name],
        ranges=[line for line in tables["ranges"] if line.layer == row.name],
    )


class StoredLayer(Layer):
    """A layer whose arrays are read from its group when they are asked for."""

    def __init__(
        self,
        group: h5py.Group,
        row: LayerRow,
        errors: Mapping[str, ErrorRow],
        spectra: Mapping[str, SpectrumRow],
        sources: Mapping[str, SourceRow],
        examples: list[ExampleRow],
        damping: Sequence[DampingRow] = (),
        ranges: Sequence[RangeRow] = (),
    ) -> None:
        self._group = group
        super().__init__(
            row,
            factors=LazyMapping(lambda: list(_reading(group, _factor_paths)), lambda key: _factors(group, key)),
            spectrum=LazyMapping(
                lambda: _reading(group, _datasets, "spectrum"), lambda key: _array(group, f"spectrum/{key}")
            ),
            eigenvectors=LazyMapping(
                lambda: _reading(group, _datasets, "eigenvectors"), lambda key: _array(group, f"eigenvectors/{key}")
            ),
            attributes=LazyMapping(
                lambda: list(_reading(group, _attributes)), lambda key: _reading(group, _attributes)[key]
            ),
            errors=errors,
            spectra=spectra,
            sources=sources,
            examples=examples,
            damping=damping,
            ranges=ranges,
        )

    # Columns and blocks can be larger than everything else together: they are read anew rather than kept.
    @property
    def kept_columns(self) -> Array | None:
        """The stored columns, or None."""
        return _kept(self._group, "columns")

    @kept_columns.setter
    def kept_columns(self, value: Array | None) -> None:
        if value is not None:
            raise AttributeError("a stored layer can't be changed")

    @property
    def tokens(self) -> Array | None:
        """The stored tokens of an embedding, or None."""
        return _kept(self._group, "tokens")

    @tokens.setter
    def tokens(self, value: Array | None) -> None:
        if value is not None:
            raise AttributeError("a stored layer can't be changed")

    @property
    def block(self) -> Array | None:
        """The stored block, or None."""
        return _kept(self._group, "block")

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
        OutputError: it can't be read, or its checksum does not match.
    """
    return _reading(group, _checked_array, name)


def _checked_array(group: h5py.Group, name: str) -> Array:
    dataset = group[name]
    # a dataset in chunks has HDF5's own checksums
    return np.asarray(dataset[()] if dataset.chunks else _values(dataset))


def _kept(group: h5py.Group, name: str) -> Array | None:
    return _array(group, name) if _reading(group, h5py.Group.__contains__, name) else None


def _reading(group: h5py.Group, read_part: Callable[..., T], *arguments: Any) -> T:
    """`read_part(group, *arguments)`, with whatever goes wrong told as damage."""
    try:
        return read_part(group, *arguments)
    except OutputError:
        raise
    except Exception as error:
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


def _factors(group: h5py.Group, key: str) -> KroneckerFactors:
    path = _reading(group, _factor_paths)[key]
    flavour, _, role = key.partition("/")
    return KroneckerFactors(flavour, A=_array(group, f"{path}/A"), B=_array(group, f"{path}/B"), role=role)


def _attributes(group: h5py.Group) -> dict[str, Any]:
    """Layer.attributes: what the group holds beside its row, and the facts beside the factors."""
    row = schema.field_types(LayerRow)
    known = {*row, *schema.UNCHECKED}
    found = {name: schema.plain(value) for name, value in group.attrs.items() if name not in known}
    for key, path in _factor_paths(group).items():
        for side in ("A", "B"):
            attributes = group[f"{path}/{side}"].attrs
            schema.check_seal(attributes, f"{group.name}/{path}/{side}")
            for name, value in attributes.items():
                if name not in schema.FACTOR_ATTRIBUTES:
                    found[f"{key}/{side}/{name}"] = schema.plain(value)
    return found
