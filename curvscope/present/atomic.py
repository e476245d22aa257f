"""Writing a result so that its name always stands for a whole file: the old one or the new one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from curvscope.errors import OutputError

# A writer that lives touches its file far more often.
STALE_SECONDS = 3600


def check_output(path: str | os.PathLike[str], force: bool = False, *, folder: bool = False) -> Path:
    """The real path (links followed) that a result may be written to; leaves nothing behind.

    Args:
        path: where the result shall go.
        force: whether an existing result may be replaced.
        folder: whether the result is a folder.

    Raises:
        OutputError: its folder is missing or not writable, something else has that name, or a result is
            there already and `force` is false.
    """
    # os.replace would replace a link itself, not what it points to.
    target = Path(os.path.realpath(path))
    parent = target.parent
    if not parent.is_dir():
        missing = not parent.exists()
        raise OutputError(
            "The folder to write to does not exist." if missing else "That is not a folder.",
            where=str(parent),
            remedy="Create it, or name another place with -o." if missing else "Name another place with -o.",
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            "The folder to write to is not writable.",
            where=str(parent),
            remedy="Name another place with -o, or change the folder's permissions.",
        )
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        _try_folder(target)
        return target
    except OSError as error:
        raise _refused(error, target) from error
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        found = "a folder" if stat.S_ISDIR(mode) else "a file" if stat.S_ISREG(mode) else "a device, pipe or socket"
        wanted = "a folder" if folder else "a file"
        raise OutputError(
            f"The result is {wanted}, but {found} has that name.",
            where=str(target),
            remedy="Name another place with -o.",
        )
    if not force:
        raise OutputError(
            "The result exists already and is kept.",
            where=str(target),
            remedy="Add --force (force=True) to replace it, or name another place with -o.",
        )
    _try_folder(target)
    return target


def check_replaced(path: str | os.PathLike[str], is_result: Callable[[Path], bool]) -> None:
    """Refuse to replace a file that is neither empty nor, by its content, an earlier result.

    Raises:
        OutputError: somebody else's file has that name, or it can't be read.
    """
    target = Path(os.path.realpath(path))
    try:
        if not target.is_file() or target.stat().st_size == 0 or is_result(target):
            return
        found = "The file that has this name is not an earlier result"
    except OSError as error:
        found = f"The file that has this name can't be looked at ({error.strerror or error})"
    raise OutputError(
        f"{found}, and is kept, whatever --force says.",
        where=str(target),
        remedy="Name another place with -o (from Python: another path), or delete the file yourself.",
    )


def _try_folder(target: Path) -> None:
    """Make a nameless file beside the target: what permissions allow, a file system such as /proc may still refuse."""
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise _refused(error, target) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], force: bool = False, *, folder: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`; it takes that name when the block ends well, and vanishes otherwise.

    The caller creates the temporary file (or folder) and closes it; it is synced to the disk and renamed.

    Raises:
        OutputError: as `check_output`, or the disk refuses; the previous result is untouched then.
    """
    target = check_output(path, force, folder=folder)
    _discard_stale(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        if folder:
            _publish_folder(temporary, target, force)
        else:
            _publish_file(temporary, target, force)
        _sync(target.parent)
    except OSError as error:
        raise _refused(error, target) from error
    finally:
        _discard(temporary)


def _publish_file(temporary: Path, target: Path, force: bool) -> None:
    """Sync and rename, keeping the permissions of a file that is replaced."""
    _sync(temporary)
    if force:
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
        return
    try:
        # Unlike rename, link fails where a file appeared under that name during the work.
        os.link(temporary, target)
    except FileExistsError as error:
        raise _appeared(target) from error
    except OSError as error:
        # This file system has no hard links.
        if target.exists():
            raise _appeared(target) from error
        os.rename(temporary, target)


def _publish_folder(temporary: Path, target: Path, force: bool) -> None:
    """Sync the files and rename the folder; with `force` the old folder is moved aside first."""
    for file in temporary.iterdir():
        _sync(file)
    _sync(temporary)
    if not (force and target.exists()):
        os.rename(temporary, target)
        return
    aside = temporary.with_suffix(".old")
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Ask the disk to keep what was written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard_stale(target: Path) -> None:
    """Remove what a writer of the same target left that was killed: nobody has touched it for a while."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.part")
    for path in target.parent.iterdir():
        if pattern.fullmatch(path.name):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    _discard(path)


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _appeared(target: Path) -> OutputError:
    return OutputError(
        "Another result appeared under this name during the work, and is kept.",
        where=str(target),
        remedy="Name another place with -o.",
    )


def _refused(error: OSError, target: Path) -> OutputError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return OutputError(
        f"The result could not be written: {error.strerror or error}.",
        where=str(target),
        remedy=f"{'Free some space or name' if full else 'Name'} another place with -o; nothing was left behind.",
    )
