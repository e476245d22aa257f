"""A run in formats that other tools read: npz, safetensors, csv and json."""

from __future__ import annotations

import csv
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from curvscope.errors import OutputError, UsageError
from curvscope.present import json
from curvscope.present.atomic import check_output, check_replaced, replacing
from curvscope.present.names import encode
from curvscope.records import TABLES, Array, Layer, Run, RunInfo, row_values

# what every export says of itself near its beginning (npz: in the comment), by which an earlier one is known
FORMAT = RunInfo.format.encode()
HEAD_BYTES = 4096
FORMATS = ("npz", "safetensors", "csv", "json")


def export(run: Run, path: str | os.PathLike[str], to: str, *, force: bool = False) -> Path:
    """The path of what was written, which is whole or not there at all.

    npz, safetensors: the arrays, named `<layer>/factors/expand/A`, `<layer>/spectrum/ggn`, ..., "/" and "%"
    in a layer's name written %2F and %25. csv: a folder with one file a table. json: as `present.json`.

    Raises:
        UsageError: there is no format of that name.
        OutputError: a result is there and `force` is false, or something else is, or it can't be written; what is there
            is untouched.
    """
    writers: dict[str, Callable[[Run, Path], None]] = {
        "npz": _write_npz,
        "safetensors": _write_safetensors,
        "csv": _write_csv,
        "json": _write_json,
    }
    if to not in writers:
        raise UsageError(f"There is no format {to!r}.", remedy=f"Formats: {', '.join(FORMATS)}.")
    check_export(path, to, force=force)
    with replacing(path, force, folder=to == "csv") as temporary:
        writers[to](run, temporary)
    return Path(path)


def default_path(run_file: str | os.PathLike[str], to: str) -> Path:
    """Where an export goes by default: the run's name with the format's suffix, in the current folder."""
    return Path(Path(run_file).stem + ("-tables" if to == "csv" else f".{to}"))


def check_export(path: str | os.PathLike[str], to: str, *, force: bool = False) -> None:
    """Raise OutputError where `export` could not or, as what is there is no earlier export, shall not write."""
    earlier = {"npz": _is_npz, "safetensors": _is_safetensors, "json": _is_json}
    if to in earlier:
        check_replaced(path, earlier[to])
    target = check_output(path, force, folder=to == "csv")
    tables = {f"{name}.csv" for name in TABLES}
    strangers = sorted(file.name for file in target.iterdir() if file.name not in tables) if target.is_dir() else []
    if strangers:
        raise OutputError(
            f"The folder holds more than tables ({strangers[0]}) and is kept.",
            where=str(target),
            remedy="Name another place with -o.",
        )


def _is_npz(path: Path) -> bool:
    """Whether `_write_npz` wrote the file: it says so in the archive's comment."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment == FORMAT
    except (zipfile.BadZipFile, NotImplementedError):
        return False


def _is_safetensors(path: Path) -> bool:
    """Whether `_write_safetensors` wrote the file: its metadata say so, which come first after 8 bytes of length."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)[8:]
    return head.startswith(b'{"__metadata__"') and b'"format":"%s"' % FORMAT in head


def _is_json(path: Path) -> bool:
    """Whether `_write_json` wrote the file: the document says so near its beginning."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    return head.startswith(b"{") and b'"format": "%s"' % FORMAT in head


def arrays(run: Run) -> Iterator[tuple[str, Array]]:
    """Every array of the run with its name, one at a time."""
    for layer in run.layers.values():
        for name, values in _layer_arrays(layer):
            yield f"{encode(layer.name)}/{name}", values


def _layer_arrays(layer: Layer) -> Iterator[tuple[str, Array]]:
    for key, factors in layer.factors.items():
        yield f"factors/{key}/A", factors.A
        yield f"factors/{key}/B", factors.B
    for name, values in layer.spectrum.items():
        yield f"spectrum/{name}", values
    for name, values in layer.eigenvectors.items():
        yield f"eigenvectors/{name}", values
    for name, kept in (("columns", layer.kept_columns), ("block", layer.block), ("tokens", layer.tokens)):
        if kept is not None:
            yield name, kept


def _write_npz(run: Run, path: Path) -> None:
    # np.savez would hold all arrays in memory at once.
    with zipfile.ZipFile(path, "x", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, values in arrays(run):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)
        archive.comment = run.info.format.encode()


def _write_safetensors(run: Run, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # safetensors writes the memory as it lies: a transposed view would come out wrong.
    contiguous = {name: np.ascontiguousarray(values) for name, values in arrays(run)}
    path.touch()
    permissions = path.stat().st_mode
    try:
        save_file(contiguous, path, metadata={"format": run.info.format, "schema_version": run.info.schema_version})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    # It replaces the file by one that only the owner may read.
    path.chmod(permissions)


def _write_csv(run: Run, path: Path) -> None:
    path.mkdir()
    for name, row_type in TABLES.items():
        with (path / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row_type.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(row_values(row) for row in run.tables.get(name, []))


def _write_json(run: Run, path: Path) -> None:
    path.write_text(json.dumps(run) + "\n", encoding="utf-8")
