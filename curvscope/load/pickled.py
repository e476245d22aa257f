"""Reading files written by torch.save without running what they hold."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from curvscope.errors import CheckpointError
from curvscope.load.importing import describe, listed, user_code
from curvscope.load.state_dict import sharded_error

_GLOBAL = re.compile(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)")
_REASON = re.compile(r"WeightsUnpickler error:\s*(.+)")
_NOT_IMPORTED = re.compile(r"must be imported to load DTensors")


def allowed_classes() -> list[type | Callable[..., Any]]:
    """What a pickled model may consist of: the module classes of torch.nn, and the functions they keep.

    A class is allowed if torch.nn itself defines it and it is built of plain tensors and modules; wrappers
    that open devices or processes are not among them.
    """
    found: list[type | Callable[..., Any]] = [
        cls
        for module in vars(nn.modules).values()
        if inspect.ismodule(module) and module.__name__.startswith("torch.nn.modules.")
        for cls in vars(module).values()
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__
    ]
    # what nn.TransformerEncoderLayer and nn.TransformerDecoderLayer keep as their activation
    found += [nn.functional.relu, nn.functional.gelu]
    # the form in which training scripts keep their options; it does nothing but hold attributes
    found.append(argparse.Namespace)
    return list(dict.fromkeys(found))


def load_pickled(path: Path, *, trust: bool) -> Any:
    """What torch.save wrote: tensors, plain containers, modules of torch.nn; anything at all with `trust`.

    Tensors come to the CPU with the dtype they were stored in.

    Raises:
        CheckpointError: the file is damaged, or holds foreign classes, which are named, and `trust` is not
            given.
    """
    try:
        with _quiet(), torch.serialization.safe_globals(list(allowed_classes())):
            content = torch.load(path, map_location="cpu", weights_only=True)
        _refuse_overridden(content, path)
        return content
    except pickle.UnpicklingError as cause:
        if _is_corrupt(path):
            raise damaged(path, cause) from cause
        foreign = foreign_globals(path, cause)
        if any("torch.distributed" in name for name in foreign) or _NOT_IMPORTED.search(str(cause)):
            raise sharded_error(str(path)) from cause
        if not trust:
            raise _refusal(path, foreign, cause) from cause
    except CheckpointError:
        raise
    except Exception as cause:
        raise damaged(path, cause) from cause
    return _load_trusted(path)


def foreign_globals(path: Path, cause: BaseException) -> list[str]:
    """The names of the classes and functions in the file that are neither torch's own nor allowed."""
    names: list[str] = []
    try:
        with torch.serialization.safe_globals(list(allowed_classes())):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        names = []  # older formats can't be listed: the message names the first
    match = _GLOBAL.search(str(cause))
    return names or ([match[1].rstrip(".")] if match else [])


def damaged(path: Path, cause: BaseException) -> CheckpointError:
    """The error for a file that begins as it should and can't be read to its end."""
    return CheckpointError(
        f"The checkpoint can't be read; it is damaged, incomplete, or of a format unknown here ({describe(cause)}).",
        where=str(path),
        remedy="Copy or save it again, and compare the file sizes.",
    )


def _refusal(path: Path, foreign: list[str], cause: BaseException) -> CheckpointError:
    if foreign:
        reason = f": {listed(foreign)}"
    elif "persistent_load" in str(cause):
        reason = " (a whole model in torch's legacy format, from before torch 1.6)"
    else:
        match = _REASON.search(str(cause))
        reason = f" ({match[1].strip()[:200] if match else describe(cause)})"
    what = f"The checkpoint holds Python objects that could run code when read{reason}."
    return CheckpointError(
        what,
        where=str(path),
        remedy="Save model.state_dict() and give --model package.module:factory; or, if you made this file "
        "yourself "
        "or trust who did, add --trust.",
    )


def _load_trusted(path: Path) -> Any:
    try:
        with user_code(), _quiet():
            return torch.load(path, map_location="cpu", weights_only=False)
    except (AttributeError, ImportError) as cause:
        raise CheckpointError(
            f"A class in the checkpoint can't be found: {describe(cause)}.",
            where=str(path),
            remedy="Run from the folder that holds its module; or save model.state_dict() and give "
            "--model package.module:factory.",
        ) from cause
    except Exception as cause:
        raise damaged(path, cause) from cause


def _is_corrupt(path: Path) -> bool:
    """Whether the checksums of a zip file say that it was changed after it was written."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except (zipfile.BadZipFile, OSError, EOFError, zlib.error):
        return True


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Warnings left out: torch warns about pickle protocols and about sources that have changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _refuse_overridden(content: Any, path: Path) -> None:
    """Refuse a pickled module whose instance attributes stand in for methods of its class.

    Allowed classes may be given any state; one that replaces `forward` would no longer be the class it says.
    """
    roots = content.values() if isinstance(content, dict) else [content]
    for root in roots:
        if not isinstance(root, nn.Module):
            continue
        for name, module in root.named_modules():
            replaced = [a for a in vars(module) if inspect.isroutine(getattr(type(module), a, None))]
            if replaced:
                raise CheckpointError(
                    f"The module replaces its own method {replaced[0]!r}, so it is not the torch.nn class it names.",
                    where=f"{path}, module {name or '(root)'}",
                    remedy="Save model.state_dict() and give --model package.module:factory.",
                )
