"""Many batches: a folder of files, a callable or an iterable of pairs, read anew for every sweep.

Nothing is held between two readings but a checksum of each batch, so memory does not grow with their number. What a
reading yields has to be what the first one did, since sums of several sweeps are put together.
"""

from __future__ import annotations

import dataclasses
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from curvscope.errors import BatchError, UsageError
from curvscope.load.batch import FILE_FORMS, check_batch, load_batch, pair_batch
from curvscope.load.importing import describe, import_object, is_import_spec, parse_import_spec, user_code
from curvscope.load.problem import Batch

# Files that folders gather without anybody's doing.
IGNORED = ("desktop.ini", "Thumbs.db")
MANY = (
    "Several batches are a folder of batch files, a callable that returns an iterable of (inputs, targets), or in "
    "Python a list of pairs or a DataLoader."
)
# Batches that are read of a source that does not say how many it has; one that goes on may never end.
MOST_UNTOLD = 1000
Change = Callable[[Batch], Batch]
_END = object()


class Batches:
    """Batches that can be read again and again, each checked as a single one is.

    `held` is the batch itself where there is one and no reading is needed; `most` is how many are read of several, None
    all of them. A source without a length may have `MOST_UNTOLD`, unless `told` says that it ends.
    """

    def __init__(
        self,
        start: Callable[[], Iterable[Any]],
        source: str,
        *,
        held: Batch | None = None,
        most: int | None = None,
        told: bool = False,
    ) -> None:
        self.source = source
        self.held = held
        self.most = most
        self._told = told
        self._start = start
        self._change: Change | None = None
        self._known: list[int] | None = None
        self._random: Tensor | None = None

    def changed(self, change: Change) -> Batches:
        """The same batches, each passed through `change` before it is handed out, after any earlier one."""
        before = self._change
        self._change = change if before is None else lambda batch: change(before(batch))
        if self.held is not None:
            self.held = change(self.held)
        return self

    def first(self) -> Batch:
        """The first batch.

        Raises:
            BatchError: there is none, or it can't be used.
        """
        return self.held if self.held is not None else next(self._read())

    def __iter__(self) -> Iterator[Batch]:
        """Every batch in turn.

        Raises:
            BatchError: a batch can't be read, is not finite, or is not what the first reading found in its place; or
                there is none.
        """
        if self.held is not None:
            yield self.held
            return
        found: list[int] = []
        for batch in self._read():
            found.append(checksum(batch))
            place = len(found) - 1
            if self._known is not None and (place >= len(self._known) or self._known[place] != found[place]):
                raise self._other(batch.source, f"a batch that the first reading did not have in place {place + 1}")
            yield batch
        if self._known is not None and len(found) != len(self._known):
            raise self._other(self.source, f"{len(found)} batches, and the first reading had {len(self._known)}")
        self._known = found

    def _read(self) -> Iterator[Batch]:
        """One reading, with the random state that the first one met: shuffling then gives the same order."""
        number = 0
        with user_code():
            if self._random is None:
                self._random = torch.random.get_rng_state()
            torch.random.set_rng_state(self._random)
            try:
                given = self._start()
                endless = self.most is None and not self._told and not _has_length(given)
                iterator = iter(given)
            except BatchError:
                raise
            except Exception as cause:
                raise self._failed(cause, "before the first batch") from cause
            state = torch.random.get_rng_state()
        while number != self.most:
            number += 1
            name = f"{self.source}, batch {number}"
            with user_code():
                torch.random.set_rng_state(state)
                try:
                    item = next(iterator, _END)
                except BatchError:
                    raise
                except Exception as cause:
                    raise self._failed(cause, f"at batch {number}") from cause
                state = torch.random.get_rng_state()
            if item is _END:
                number -= 1
                break
            if endless and number > MOST_UNTOLD:
                raise BatchError(
                    f"It has no length and goes on after {MOST_UNTOLD} batches; it may never end.",
                    where=self.source,
                    remedy="Say how many to take: --batches K (in Python batches=K) takes the first K.",
                )
            batch = item if isinstance(item, Batch) else pair_batch(item, name)
            check_batch(batch)
            yield batch if self._change is None else self._change(batch)
        if number == 0:
            raise BatchError("There is no batch: it yielded nothing.", where=self.source, remedy=MANY)

    def _failed(self, cause: Exception, when: str) -> BatchError:
        return BatchError(
            f"The batch function failed {when}: {describe(cause)}.",
            where=self.source,
            remedy="Call it on its own to see the full traceback, or add --debug.",
        )

    def _other(self, where: str, found: str) -> BatchError:
        return BatchError(
            f"The batches change between readings: a later reading yielded {found}.",
            where=where,
            remedy="Every pass over the model reads all batches again and needs the same ones: fix the seed of "
            "shuffling and augmentation, or write the batches to a folder of files.",
        )


def open_batches(batch: Any, most: int | None = None) -> Batches:
    """The batches given as `load_batch` takes one, or as several, of which the first `most` are read.

    Several are a folder of batch files (by name), a callable that returns an iterable of pairs (or
    "package.module:callable"), or an iterable such as a DataLoader. A list of pairs is several batches; a tuple of two
    is one pair.

    Raises:
        BatchError: the batch can't be read, is missing, or can be read only once.
        UsageError: several are asked for, and one is given.
    """
    if isinstance(batch, (str, os.PathLike)):
        path = Path(batch)
        if path.is_dir():
            return _folder(path, most)
        if not path.is_file() and isinstance(batch, str) and is_import_spec(batch):
            return _named(batch, most)
    elif callable(batch) and not isinstance(batch, Iterable):
        return _called(batch, "batch", most)
    elif _several(batch):
        return Batches(lambda: batch, "batch", most=most)
    elif isinstance(batch, Iterator):
        raise BatchError(
            "A generator can be read only once, and every pass over the model reads all batches.",
            where="batch",
            remedy="Give the function that makes it, or a list of pairs.",
        )
    elif isinstance(batch, Iterable) and not isinstance(batch, (Mapping, Sequence, Tensor, Batch)):
        return Batches(lambda: batch, "batch", most=most)
    return _single(load_batch(batch), most)


def _single(held: Batch, most: int | None) -> Batches:
    """One batch, of which more than one can't be taken.

    Raises:
        UsageError: more are asked for.
    """
    if most is not None and most > 1:
        raise UsageError(
            f"The first {most} batches can't be taken: one batch was given.",
            where="--batches",
            remedy=f"Leave it out. {MANY}",
        )
    return Batches(lambda: (), held.source, held=held)


def _folder(path: Path, most: int | None) -> Batches:
    """Every file of a folder is a batch, in the order of their names, numbers in these counted: 2 before 10.

    Raises:
        BatchError: the folder holds no file, or something that is none.
    """
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".") and entry.name not in IGNORED]
    entries.sort(key=lambda entry: (_counted(entry.name), entry.name))
    if not entries:
        raise BatchError("The batch folder is empty.", where=str(path), remedy=FILE_FORMS)
    for entry in entries:
        if not entry.is_file():
            raise BatchError(
                "The batch folder holds something that is no batch file.",
                where=str(entry),
                remedy=f"Keep batch files only in it. {FILE_FORMS}",
            )
    return Batches(lambda: (load_batch(entry) for entry in entries), str(path), most=most, told=True)


def _counted(name: str) -> list[tuple[int, int | str]]:
    """The name in parts that compare as people count: digits as numbers, and these before words."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def _named(text: str, most: int | None) -> Batches:
    spec = parse_import_spec(text, argument="--batch", error=BatchError)
    function = import_object(spec, argument="--batch", error=BatchError)
    if not callable(function):
        raise BatchError(
            f"It is a {type(function).__name__}, not a callable that returns (inputs, targets).",
            where=f"--batch {text}",
            remedy="Name a function that takes no arguments and returns (inputs, targets), or an iterable of them.",
        )
    return _called(lambda: function(*spec.args, **spec.kwargs), f"--batch {text}", most)


def _called(function: Callable[[], Any], source: str, most: int | None) -> Batches:
    """What a callable returns: a pair, which is held, or an iterable of pairs, for which it is called again."""
    with user_code():
        random = torch.random.get_rng_state()
        try:
            found = function()
        except Exception as cause:
            raise BatchError(
                f"The batch function failed: {describe(cause)}.",
                where=source,
                remedy="Call it on its own to see the full traceback, or add --debug.",
            ) from cause
    if _several(found) or (isinstance(found, Iterable) and not isinstance(found, (Mapping, Sequence, Tensor))):
        batches = Batches(function, source, most=most)
        batches._random = random
        return batches
    held = pair_batch(found, source)
    check_batch(held)
    return _single(dataclasses.replace(held, source=source), most)


def _has_length(value: Iterable[Any]) -> bool:
    """Whether it says how many batches it has; a DataLoader over an iterable dataset raises instead."""
    try:
        len(value)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return False
    return True


def _several(value: Any) -> bool:
    """Whether a list or tuple is one of batches: pairs throughout, and no pair itself."""
    if not isinstance(value, (list, tuple)) or (isinstance(value, tuple) and len(value) == 2):
        return False
    return len(value) > 0 and all(_pair_like(item) for item in value)


def _pair_like(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(str(key).split(".")[0] == "targets" for key in value)
    return isinstance(value, Batch) or (isinstance(value, (tuple, list)) and len(value) == 2)


def checksum(batch: Batch) -> int:
    """CRC-32 of every tensor's shape and bytes, and of everything else in words."""
    total = 0
    for leaf in tree_leaves((batch.inputs.args, dict(batch.inputs.kwargs), batch.targets)):
        if isinstance(leaf, Tensor):
            data = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            total = zlib.crc32(data, zlib.crc32(f"{leaf.dtype}{list(leaf.shape)}".encode(), total))
        elif isinstance(leaf, (bool, int, float, str, bytes, type(None))):
            total = zlib.crc32(repr(leaf).encode(), total)
    return total
