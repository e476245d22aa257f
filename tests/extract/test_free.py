"""Free memory inside containers: the limit of every control group above the process counts, v1 and v2."""

from __future__ import annotations

from pathlib import Path

from curvscope.extract.free import group_headrooms


def files(root: Path, **texts: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (root / name.replace("__", ".")).write_text(text + "\n")


def test_version_2_with_a_parent_that_allows_less(tmp_path: Path) -> None:
    files(tmp_path, groups="0::/outer/inner")
    mount = tmp_path / "cgroup"
    files(mount / "outer", memory__max="1000", memory__current="900", memory__stat="anon 1\ninactive_file 300")
    files(mount / "outer" / "inner", memory__max="max", memory__high="2000", memory__current="500")
    assert sorted(group_headrooms(tmp_path / "groups", mount)) == [400, 1500]


def test_version_1_inside_a_container_whose_path_is_not_mounted(tmp_path: Path) -> None:
    files(tmp_path, groups="5:cpu:/x\n4:memory:/docker/abc")
    mount = tmp_path / "cgroup"
    files(mount / "memory", memory__limit_in_bytes="1000", memory__usage_in_bytes="250")
    assert group_headrooms(tmp_path / "groups", mount) == [750]


def test_no_limit_and_no_groups(tmp_path: Path) -> None:
    files(tmp_path, groups="4:memory:/")
    mount = tmp_path / "cgroup"
    files(mount / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="250")
    assert group_headrooms(tmp_path / "groups", mount) == []
    assert group_headrooms(tmp_path / "absent", mount) == []
