"""How many of several batches are read, and sources that never end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import curvscope
from curvscope.errors import BatchError, UsageError
from curvscope.load import batches
from curvscope.load.batches import open_batches

PAIRS = [(torch.full((2, 3), float(i)), torch.tensor([0, 1])) for i in range(6)]
read: list[int] = []


def endless() -> Iterator[Any]:
    for i in itertools.count():
        read.append(i)
        yield torch.full((2, 3), float(i)), torch.tensor([0, 1])


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        return ((torch.full((3,), float(i)), torch.tensor(i % 2)) for i in itertools.count())


def firsts(source: Any, most: int | None) -> list[float]:
    return [float(batch.inputs.args[0][0, 0]) for batch in open_batches(source, most)]


def folder(path: Path) -> Path:
    for i, (inputs, targets) in enumerate(PAIRS):
        torch.save({"inputs": inputs, "targets": targets}, path / f"{i}.pt")
    return path


def test_the_first_are_taken_of_every_source(tmp_path: Path) -> None:
    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    assert firsts(loader, 2) == [0.0, 2.0]
    for source in (PAIRS, lambda: iter(PAIRS), lambda: PAIRS, folder(tmp_path), endless):
        assert firsts(source, 3) == [0.0, 1.0, 2.0]
    assert firsts(PAIRS, 9) == [float(i) for i in range(6)]  # there are no more


def test_no_batch_beyond_them_is_read() -> None:
    read.clear()
    source = open_batches(endless, 3)
    for _ in range(2):
        assert len(list(source)) == 3
    assert max(read) == 2


@pytest.mark.parametrize(
    "source", [endless, torch.utils.data.DataLoader(Stream(), batch_size=1)], ids=["function", "loader"]
)
def test_a_source_that_goes_on_for_ever_is_refused(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST_UNTOLD", 5)
    with pytest.raises(BatchError, match="may never end") as caught:
        list(open_batches(source))
    assert "--batches K" in caught.value.remedy


def test_what_says_how_many_it_has_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "MOST_UNTOLD", 5)
    for source in (PAIRS, lambda: PAIRS, folder(tmp_path)):
        assert len(firsts(source, None)) == 6
    assert len(firsts(lambda: iter(PAIRS[:5]), None)) == 5


def test_through_the_analysis() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    run = curvscope.analyze(model, endless, loss="cross_entropy", batches=2)
    assert run.model.examples == 4
    with pytest.raises(UsageError, match="at least 1"):
        curvscope.analyze(model, endless, loss="cross_entropy", batches=0)


def test_files_of_a_folder_come_as_people_count(tmp_path: Path) -> None:
    names = ["a.pt", "batch-9.pt", "batch-10.pt", "batch-100.pt", "batch_1.pt", "2.pt", "10.pt", "010.pt"]
    for number, name in enumerate(names):
        torch.save({"inputs": torch.full((1, 1), float(number)), "targets": torch.tensor([0])}, tmp_path / name)
    wanted = ["2.pt", "010.pt", "10.pt", "a.pt", "batch-9.pt", "batch-10.pt", "batch-100.pt", "batch_1.pt"]
    assert firsts(tmp_path, None) == [float(names.index(name)) for name in wanted]


@pytest.mark.parametrize("content", [b"", b"not a tensor", None], ids=["empty", "text", "cut off"])
def test_a_file_in_the_middle_that_can_not_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = folder(tmp_path) / "3.pt"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    source = iter(open_batches(tmp_path))
    for _ in range(3):
        next(source)
    with pytest.raises(BatchError) as caught:
        next(source)
    assert "3.pt" in caught.value.where
    assert caught.value.remedy


def test_fewer_batches_than_asked_for_are_told(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    notes = curvscope.analyze(model, folder(tmp_path), loss="cross_entropy", batches=9).notes
    assert "There are 6 batches, and all were taken: --batches 9 asked for more." in notes
    for most in (6, 2):
        run = curvscope.analyze(model, folder(tmp_path), loss="cross_entropy", batches=most)
        assert not any("--batches" in note for note in run.notes)


@pytest.mark.parametrize("kind", ["pair", "file", "callable"])
def test_of_one_batch_several_cannot_be_taken(kind: str, tmp_path: Path) -> None:
    folder(tmp_path)
    one = {"pair": PAIRS[0], "file": str(tmp_path / "0.pt"), "callable": lambda: PAIRS[0]}[kind]
    assert firsts(one, 1) == firsts(one, None) == [0.0]
    with pytest.raises(UsageError, match="one batch was given"):
        open_batches(one, 3)
