"""How much memory there is to take: what the machine has left, and what its container allows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

# Where a machine tells nothing.
ASSUMED_BYTES = 4 * 2**30
# cgroup v2 says "max" where there is no limit, v1 a number near 2^63.
NO_LIMIT = 2**60


def free_bytes(device: torch.device) -> int:
    """Bytes that can be taken now: the GPU's own count; on the CPU the least of what any source says.

    The sources are MemAvailable and, for the process's control group and every one above it, the limit less what is
    used (files that are cached and could be dropped do not count as used).
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [*_available(Path("/proc/meminfo")), *group_headrooms(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    return max(0, min(found)) if found else _installed() // 2


def _available(path: Path) -> list[int]:
    """MemAvailable of /proc/meminfo, which counts the page cache that can be dropped."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(path), re.MULTILINE)
    return [int(found[1]) * 1024] if found else []


def group_headrooms(groups: Path, mount: Path) -> list[int]:
    """What the process's control groups leave, v1 and v2, from the process's own up to the root.

    Args:
        groups: /proc/self/cgroup.
        mount: /sys/fs/cgroup.
    """
    found: list[int] = []
    limits: Sequence[str]
    for line in _text(groups).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            for root in (mount, mount / "unified"):
                limits = ("memory.max", "memory.high")
                found += _headrooms(root, path, limits, "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            limits = ("memory.limit_in_bytes",)
            found += _headrooms(mount / "memory", path, limits, "memory.usage_in_bytes", "total_inactive_file")
    return found


def _headrooms(root: Path, path: str, limits: Sequence[str], usage: str, cached: str) -> Iterator[int]:
    """Limit less use of every group between `path` and the root; inside a container the root is its own group."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for count in range(len(parts), -1, -1):
        folder = root.joinpath(*parts[:count])
        allowed = [int(text) for name in limits if (text := _text(folder / name).strip()).isdigit()]
        if not allowed or min(allowed) >= NO_LIMIT:
            continue
        used = _text(folder / usage).strip()
        droppable = re.search(rf"^{cached} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
        taken = int(used) if used.isdigit() else 0
        yield min(allowed) - max(0, taken - (int(droppable[1]) if droppable else 0))


def _installed() -> int:
    """All memory of a machine that does not tell what is available (macOS, say)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return ASSUMED_BYTES


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
