"""What a result never replaces, not even with --force: the files that it is made from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from curvscope.errors import OutputError


def check_kept(path: str | os.PathLike[str], sources: Iterable[str | os.PathLike[str] | None]) -> None:
    """Refuse a target that is a source, by any link or name, or one of a source folder's files, or that holds a source.

    Sources that are no files (None, the names of functions) are passed over. In a source folder an earlier run may be
    replaced.

    Raises:
        OutputError: naming the source.
    """
    target = Path(os.path.realpath(path))
    for source in sources:
        if source is None or not os.path.exists(source):
            continue
        given = Path(os.path.realpath(source))
        if _same(target, given) or given.is_relative_to(target):
            raise _needed(target, given)
        if given.is_dir() and target.exists():
            inside = target.is_relative_to(given) or any(_same(target, file) for file in given.iterdir())
            if inside and not _is_run(target):
                raise _needed(target, given)


def check_no_batch(path: str | os.PathLike[str], folder: str | os.PathLike[str] | None) -> None:
    """Refuse a target directly in a batch folder, every file of which is read as a batch.

    Raises:
        OutputError: the result would be the next reading's batch.
    """
    if folder is not None and os.path.isdir(folder) and os.path.realpath(Path(path).parent) == os.path.realpath(folder):
        raise OutputError(
            "Every file of the batch folder is read as a batch, and the result would be one of them.",
            where=str(path),
            remedy="Name another place with -o (from Python: another path).",
        )


def _same(target: Path, source: Path) -> bool:
    return target.exists() and os.path.samefile(target, source)


def _is_run(path: Path) -> bool:
    from curvscope.present import hdf5

    try:
        hdf5.read(path)
    except OutputError:
        return False
    return True


def _needed(target: Path, source: Path) -> OutputError:
    what = "It is what the result is made from" if target == source else f"It belongs to {source}"
    return OutputError(
        f"{what}, and is kept, whatever --force says.",
        where=str(target),
        remedy="Name another place with -o (from Python: another path).",
    )
