from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from curvscope.errors import OutputError
from curvscope.present.atomic import check_output, replacing

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


@pytest.mark.parametrize(
    ("name", "force", "words"),
    [
        pytest.param("there.h5", False, "exists already", id="exists"),
        pytest.param("nowhere/run.h5", True, "does not exist", id="no folder"),
        pytest.param("there.h5/run.h5", True, "not a folder", id="below a file"),
        pytest.param("folder", True, "a folder has that name", id="a folder"),
        pytest.param("/dev/null", True, "a device", id="a device"),
        pytest.param("link.h5", False, "exists already", id="link to a file"),
    ],
)
def test_refused_before_the_work(tmp_path: Path, name: str, force: bool, words: str) -> None:
    (tmp_path / "there.h5").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.h5").symlink_to("there.h5")
    with pytest.raises(OutputError, match=words) as caught:
        check_output(tmp_path / name, force)
    assert caught.value.remedy
    assert ("Create it" in caught.value.remedy) == (words == "does not exist")
    assert (tmp_path / "there.h5").read_text() == "old"


@pytest.mark.skipif(ROOT, reason="root may write anywhere")
def test_unwritable_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="not writable"):
        check_output(tmp_path / "run.h5")


def test_access_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="not writable"):
        check_output(tmp_path / "run.h5")


def test_replaced_whole_with_its_permissions_through_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "run.h5", tmp_path / "link.h5"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target.name)
    with replacing(link, force=True) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OutputError])
@pytest.mark.parametrize("folder", [False, True])
def test_nothing_is_left_when_the_work_fails(tmp_path: Path, error: type[BaseException], folder: bool) -> None:
    with (  # noqa: PT012
        pytest.raises(error),
        replacing(tmp_path / "result", folder=folder) as temporary,
    ):
        if folder:
            temporary.mkdir()
            (temporary / "part").write_text("half")
        else:
            temporary.write_text("half")
        raise error("stop")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOENT])
def test_the_disk_refuses(tmp_path: Path, number: int) -> None:
    with (  # noqa: PT012
        pytest.raises(OutputError, match=os.strerror(number)) as caught,
        replacing(tmp_path / "run.h5") as temporary,
    ):
        temporary.write_text("half")
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == 3
    assert ("Free some space" in caught.value.remedy) == (number == errno.ENOSPC)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("linked", [True, False], ids=["with hard links", "without"])
def test_a_file_that_appears_during_the_work_is_kept(
    tmp_path: Path, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not linked:

        def no_links(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
    target = tmp_path / "run.h5"
    with pytest.raises(OutputError, match="appeared"), replacing(target) as temporary:  # noqa: PT012
        temporary.write_text("mine")
        target.write_text("theirs")
    assert target.read_text() == "theirs"


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "tables"
    for content in ("old", "new"):
        with replacing(target, force=True, folder=True) as temporary:
            temporary.mkdir()
            (temporary / f"{content}.csv").write_text(content)
    assert [file.name for file in target.iterdir()] == ["new.csv"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_writer_left_is_removed_later(tmp_path: Path) -> None:
    target = tmp_path / "run.h5"
    old, fresh, other = (
        tmp_path / name for name in (".run.h5.0123abcd.part", ".run.h5.00000000.part", ".run2.h5.0123abcd.part")
    )
    for path in (old, fresh, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (0, 0))
    with replacing(target) as temporary:
        temporary.write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([fresh.name, other.name, target.name])
