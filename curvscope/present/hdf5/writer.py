"""Writing a run to HDF5, safely: a temporary file, checked and synced, takes the target's name at the end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from curvscope.errors import OutputError
from curvscope.present.atomic import replacing
from curvscope.present.hdf5 import schema
from curvscope.present.hdf5.earlier import check_target
from curvscope.present.hdf5.sink import Sink
from curvscope.present.meanings import meaning
from curvscope.present.names import encode
from curvscope.records import CONVENTIONS, TABLES, Array, KroneckerFactors, Layer, Run, row_values

# Below this a dataset is stored contiguously: chunk indices and filters would cost more than they save.
CONTIGUOUS_BYTES = 64 * 1024
CHUNK_BYTES = 1024 * 1024


def write(run: Run, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """The path of the file that now holds `run`: tables, factors, spectra and what was dumped.

    Floats and arrays keep their bits. A reader sees the previous file or the new one, never half of one.

    Raises:
        OutputError: as `check_target`, or the disk refuses; the previous file is untouched then.
    """
    check_target(path, force)
    with replacing(path, force) as temporary:
        sink = Sink(temporary)
        try:
            # the older layout has no checksums of its own metadata
            with h5py.File(sink, "w", libver=("v110", "v110")) as file:
                _write_run(file, run, sink)
                file.flush()
                file.attrs["complete"] = True
        finally:
            sink.close()
            sink.check()
        _check(temporary, run)
    return Path(path)


def _write_run(file: h5py.File, run: Run, sink: Sink) -> None:
    for name, value in vars(run.info).items():
        if name != "complete":
            file.attrs[name] = _attribute(value)
    schema.seal(file.attrs)
    file.create_dataset("config", data=schema.text(json.dumps(run.config)), dtype=h5py.string_dtype())
    _seal_values(file["config"])
    model = file.create_group("model")
    for name, value in vars(run.model).items():
        model.attrs[name] = _attribute(value)
    schema.seal(model.attrs)
    file.create_dataset(schema.NOTES, data=[schema.text(note) for note in run.notes], dtype=h5py.string_dtype())
    _seal_values(file[schema.NOTES])
    stages = np.array(
        [(schema.text(stage), seconds) for stage, seconds in run.seconds.items()],
        dtype=[("stage", h5py.string_dtype()), ("seconds", "<f8")],
    )
    _seal_values(file.create_dataset(schema.TIMING, data=stages))
    tables = file.create_group("tables")
    for name in TABLES:
        _write_table(tables, name, run.tables.get(name, []))
    conventions = file.create_group("layers")
    for name, words in CONVENTIONS.items():
        conventions.attrs[f"convention_{name}"] = words
    for layer in run.layers.values():
        sink.check()
        _write_layer(conventions.create_group(encode(layer.name)), layer)


def _write_table(group: h5py.Group, name: str, rows: list[Any]) -> None:
    """One compound dataset; the meaning and unit of each column stand in its attributes."""
    types = schema.field_types(TABLES[name])
    cells = [
        tuple(schema.text(str(value)) if types[column] is str else value for column, value in row_values(row).items())
        for row in rows
    ]
    dataset = group.create_dataset(name, data=np.array(cells, dtype=schema.row_dtype(TABLES[name])))
    for column in types:
        dataset.attrs[f"meaning_{column}"] = meaning(name, column)
    _seal_values(dataset)


def _write_layer(group: h5py.Group, layer: Layer) -> None:
    for name, value in row_values(layer.row).items():
        group.attrs[name] = _attribute(value)
    owned: set[str] = set()
    for factors in layer.factors.values():
        owned |= _write_factors(group, layer, factors)
    for key, value in layer.attributes.items():
        if key not in owned:
            group.attrs[key] = _attribute(value)
    for name, values in layer.spectrum.items():
        dataset = _write_array(group, f"spectrum/{name}", values)
        dataset.attrs["dimensions"] = "[rank], descending, the numerically nonzero part"
        dataset.attrs["units"] = "loss / parameter^2"
        row = layer.spectra.get(name)
        if row is not None and row.status == "estimated":
            dataset.attrs["status"], dataset.attrs["reason"] = row.status, schema.text(row.reason)
    compact = layer.tokens is not None and not any(factors.role for factors in layer.factors.values())
    for name, values in layer.eigenvectors.items():
        dataset = _write_array(group, f"eigenvectors/{name}", values)
        dataset.attrs["dimensions"] = "one eigenvector a column"
        dataset.attrs["convention"] = CONVENTIONS["vec"]
    if layer.tokens is not None:
        dataset = _write_array(group, "tokens", layer.tokens)
        dataset.attrs["dimensions"] = "[U], the tokens that occur in the batch, ascending"
        dataset.attrs["convention"] = CONVENTIONS["embedding"]
    if layer.kept_columns is not None:
        dataset = _write_array(group, "columns", layer.kept_columns)
        dataset.attrs["dimensions"] = "[N*K, d_out, d_in(+1)]" if not compact else "[N*K, d_out, U], U of tokens"
        dataset.attrs["convention"] = CONVENTIONS["ggn"]
    if layer.block is not None:
        dataset = _write_array(group, "block", layer.block)
        size = "U, U of tokens" if compact else "d_in(+1)"
        dataset.attrs["dimensions"] = f"[P, P], P = d_out * {size}"
        dataset.attrs["convention"] = CONVENTIONS["vec"]
        dataset.attrs["units"] = "loss / parameter^2"
    schema.seal(group.attrs)


def _seal_values(dataset: h5py.Dataset) -> None:
    """Store the checksum of what the dataset holds, as a reader sees it."""
    dataset.attrs[schema.VALUES] = schema.checksum(dataset[()])


def _write_factors(group: h5py.Group, layer: Layer, factors: KroneckerFactors) -> set[str]:
    """Both factors with their facts; returns the keys of Layer.attributes that were stored beside them."""
    path = f"{factors.flavour}/{encode(factors.role)}" if factors.role else factors.flavour
    key = f"{factors.flavour}/{factors.role}" if factors.role else factors.flavour
    owned = set()
    lookup = layer.row.kind == "embedding" or factors.role == "embedding"
    inputs = "[d_in(+1), d_in(+1)]"
    if lookup:
        inputs = "[d_in], a diagonal" if factors.flavour == "expand" else "[U, U], U of tokens"
    described = {
        "A": (factors.A, inputs, "activation^2"),
        "B": (factors.B, "[d_out, d_out]", "loss / output^2"),
    }
    for side, (values, dimensions, units) in described.items():
        dataset = _write_array(group, f"factors/{path}/{side}", values)
        dataset.attrs["trace"] = _trace(values)
        dataset.attrs["convention"] = CONVENTIONS.get(factors.flavour, "")
        dataset.attrs["dimensions"] = dimensions
        dataset.attrs["units"] = units
        dataset.attrs["flavour"] = factors.flavour
        dataset.attrs["role"] = schema.text(factors.role)
        for name, value in layer.attributes.items():
            if name.startswith(f"{key}/{side}/"):
                owned.add(name)
                dataset.attrs[name.removeprefix(f"{key}/{side}/")] = _attribute(value)
        schema.seal(dataset.attrs)
    return owned


def _trace(values: Array) -> float:
    """The factor's trace in float64; a vector is a diagonal, a stack of matrices a block diagonal."""
    diagonal = values if values.ndim < 2 else np.diagonal(values, axis1=-2, axis2=-1)
    return float(np.sum(diagonal, dtype=np.float64))


def _write_array(group: h5py.Group, name: str, values: Array) -> h5py.Dataset:
    """Contiguous when small; otherwise in chunks of about a megabyte with shuffle, gzip and a checksum."""
    array = np.asarray(values)
    source = array.dtype
    if source.kind not in "fiub":
        # bfloat16 has no HDF5 type that plain viewers read; float32 holds every value of it.
        array = array.astype(np.float32)
    if array.nbytes < CONTIGUOUS_BYTES:
        dataset = group.create_dataset(name, data=array)
        dataset.attrs[schema.VALUES] = schema.checksum(array)
    else:
        row_bytes = array.nbytes // len(array)
        chunks: Any = True
        if row_bytes <= CHUNK_BYTES:
            chunks = (min(len(array), max(1, CHUNK_BYTES // row_bytes)), *array.shape[1:])
        dataset = group.create_dataset(
            name,
            data=array,
            chunks=chunks,
            compression="gzip",
            compression_opts=1,
            shuffle=True,
            fletcher32=True,
        )
    if source != array.dtype:
        dataset.attrs["source_dtype"] = str(source)
    return dataset


def _attribute(value: Any) -> Any:
    """A value that an HDF5 attribute can hold."""
    if isinstance(value, str):
        return schema.text(value)
    if isinstance(value, (bool, int, float, np.generic, np.ndarray)):
        return value
    return json.dumps(value)


def _check(temporary: Path, run: Run) -> None:
    """Reopen what was written and compare its inventory with the run's."""
    with h5py.File(temporary, "r") as file:
        found = {name: len(table) for name, table in file["tables"].items()}
        layers = {group.attrs["name"] for group in file["layers"].values()}
        sound = (
            bool(file.attrs["complete"])
            and found == {name: len(run.tables.get(name, [])) for name in TABLES}
            and layers == {schema.text(name) for name in run.layers}
        )
    if not sound:
        raise OutputError(
            f"The file read back is not what was written: tables {found}, {len(layers)} layers.",
            where=str(temporary),
            remedy="Check the disk, and write to another one with -o.",
        )
