"""Which files a run may replace: earlier runs, and nothing of anybody else's."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import h5py

from curvscope.present.atomic import check_output, check_replaced
from curvscope.present.hdf5 import schema

SIGNATURE = b"\x89HDF\r\n\x1a\n"


def check_target(path: str | os.PathLike[str], force: bool = False) -> Path:
    """The real path that a run may be written to; leaves nothing behind.

    Raises:
        OutputError: as `check_output`, or a file is there that is no run, which not even `force` replaces.
    """
    check_replaced(path, _may_go)
    return check_output(path, force)


def _may_go(path: Path) -> bool:
    """Whether the file is a run, be it damaged; HDF5 files of others are not."""
    with path.open("rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            return False
    try:
        # a process that opens a file twice has to say the same of locking, and somebody's lock says nothing here
        with h5py.File(path, "r", locking=False) as run:
            return schema.plain(run.attrs.get("format", "")) == schema.FORMAT
    except (OSError, RuntimeError, KeyError, ValueError):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(schema.FORMAT.encode()) >= 0
