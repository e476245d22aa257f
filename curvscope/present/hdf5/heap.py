"""A look at the strings of an HDF5 file before the HDF5 library sees them.

The library keeps strings in global heaps (HDF5 file format specification 3.0, III.E) without a checksum, and reads on
for ever in a heap whose free space has the size 0.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

SIGNATURE = b"GCOL\x01\0\0\0"
HEADER = len(SIGNATURE) + 8


def sound_heaps(path: Path) -> bool:
    """Whether the objects of every global heap in the file follow each other up to its end."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return True
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = data.find(SIGNATURE)
            while start >= 0:
                if not _sound(data, start):
                    return False
                start = data.find(SIGNATURE, start + 1)
    return True


def _sound(data: mmap.mmap, start: int) -> bool:
    if start + HEADER > len(data):
        return False
    (size,) = struct.unpack_from("<Q", data, start + len(SIGNATURE))
    end = start + size
    if size < HEADER or end > len(data):
        return False
    position = start + HEADER
    while position + 16 <= end:
        index, length = struct.unpack_from("<H6xQ", data, position)
        if index == 0:  # the free space, whose length counts its own header
            return bool(position + length == end)
        position += 16 + -(-length // 8) * 8
    return position <= end
