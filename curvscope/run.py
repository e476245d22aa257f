"""What `analyze` returns and `open` reads back: the record of a run, with what can be done with it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from curvscope import records
from curvscope.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class Run(records.Run):
    """Everything one analysis found (see `curvscope.records.Run`), to save, show and tabulate.

    Attributes:
        path: the file it was read from or last saved to, None before.
        sources: the files and folders it was made from, checkpoint and batch in this order, None for
            what `analyze` was given as objects.
    """

    path: Path | None = None
    sources: tuple[Path | None, ...] = ()

    @classmethod
    def of(cls, record: records.Run, path: Path | None = None) -> Run:
        """The record as a `Run`; nothing is copied."""
        return cls(
            info=record.info,
            model=record.model,
            config=record.config,
            layers=record.layers,
            tables=record.tables,
            notes=record.notes,
            seconds=record.seconds,
            path=path,
        )

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """The path of the HDF5 file that now holds the run (schema 1.0).

        Raises:
            OutputError: a file is there and `force` is false, or it is no run or one that this run is made from, or it
                can't be written; the old one is kept.
        """
        from curvscope.present import hdf5
        from curvscope.present.kept import check_kept, check_no_batch

        check_kept(path, self.sources)
        for source in self.sources[1:]:
            check_no_batch(path, source)
        self.path = hdf5.write(self, path, force=force)
        return self.path

    def show(self, layer: str | None = None, *, file: TextIO | None = None) -> None:
        """Print the report, or one layer in full, to `file` (standard output by default).

        Raises:
            UsageError: there is no layer of that name.
        """
        from curvscope.present import terminal

        terminal.show(self, layer, file=file, path=self.path)

    def to_pandas(self, table: str) -> pd.DataFrame:
        """One of `run.tables` as a DataFrame, columns in the order of the file.

        Raises:
            UsageError: there is no such table, or pandas is not installed.
        """
        if table not in records.TABLES:
            raise UsageError(f"There is no table {table!r}.", remedy=f"Tables: {', '.join(records.TABLES)}.")
        try:
            import pandas as pd
        except ImportError as error:
            raise UsageError(
                "pandas is not installed.",
                where=f"to_pandas({table!r})",
                remedy="pip install 'curvscope[report]', or use run.tables, a list of rows.",
            ) from error
        columns = list(records.TABLES[table].__dataclass_fields__)
        return pd.DataFrame([records.row_values(row) for row in self.tables.get(table, [])], columns=columns)


def open_run(path: str | os.PathLike[str]) -> Run:
    """The run stored in an HDF5 file; factors and other arrays are read when they are used.

    Raises:
        OutputError: there is no such file, it is not a curvscope run, it is damaged or unfinished, or its
            schema has another major version.
    """
    from curvscope.present import hdf5

    return Run.of(hdf5.read(path), Path(path))
