"""The file that HDF5 writes to, so that a full disk or Ctrl-C ends the writing in good order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Sink:
    """A new binary file whose first failure is kept for `check`, and which ignores what is written after it.

    HDF5 can't close a file whose disk refuses, complains on stderr for each object, and would swallow an
    interrupt that comes while it writes.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb+", buffering=0)
        self._failure: BaseException | None = None

    def check(self) -> None:
        """Raise the first failure, if there was one."""
        if self._failure is not None:
            raise self._failure

    def write(self, data: Any) -> int:
        """Write all of the data, or nothing after a failure; claims success."""
        view = memoryview(data).cast("B")
        size = len(view)
        while len(view) and self._failure is None:
            view = view[self._attempt(functools.partial(self._file.write, view)) :]
        return size

    def truncate(self, size: int | None = None) -> int:
        """Cut or extend the file."""
        self._attempt(lambda: self._file.truncate(size))
        return self._file.tell()

    def flush(self) -> None:
        """Nothing is buffered."""

    def read(self, size: int = -1) -> bytes:
        """Read what was written before (h5py takes an object with this method for a file)."""
        return self._file.read(size) or b""

    def readinto(self, buffer: Any) -> int:
        """Read what was written before."""
        return self._attempt(lambda: self._file.readinto(buffer))

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to another place."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The present place."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._attempt(self._file.close)

    def _attempt(self, operation: Callable[[], int | None]) -> int:
        if self._failure is None:
            try:
                return operation() or 0
            except BaseException as failure:
                self._failure = failure
        return 0
