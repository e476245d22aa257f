"""What a file's first bytes say it is; suffixes are not looked at."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal

HEAD_BYTES = 128
SHORTEST_TEXT = 4
"""Bytes below which a file that breaks off looks like text by chance."""
TORCH_LEGACY = bytes.fromhex("6cfc9c46f9206aa85019")
"""The number with which torch.save began its files before they were zip files."""
LFS_POINTER = b"version https://git-lfs"

Kind = Literal["empty", "zip", "hdf5", "safetensors", "torch", "pickle", "npy", "lfs", "text", "unknown"]


def sniff(path: Path) -> tuple[Kind, bytes]:
    """The kind of the file, and its first bytes.

    A safetensors file is 8 bytes of length, little-endian, and a JSON object; as the length may begin with
    any byte, it is looked for before the kinds that are known by their first bytes.

    Raises:
        OSError: the file can't be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    return _kind(head, path.stat().st_size), head


def _kind(head: bytes, size: int) -> Kind:
    if not head:
        return "empty"
    if len(head) > 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= size:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if head[:1] == b"\x80" and TORCH_LEGACY in head[:32]:
        return "torch"
    if head[:1] == b"\x80" and head[1:2] in (b"\x01", b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(LFS_POINTER):
        return "lfs"
    text = head[:64].decode("utf-8", errors="replace").rstrip("\ufffd")
    if len(text) >= SHORTEST_TEXT and all(c.isprintable() or c.isspace() for c in text) and "\ufffd" not in text:
        return "text"
    return "unknown"
