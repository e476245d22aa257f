"""The members of a torch.export archive: a zip file, read and written without torch.

What the members mean, and whether they may be trusted, is the business of `curvscope.load.vet`.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
ROOT = "archive"
PLAIN_MEMBERS = {
    "archive_format": b"pt2",
    "archive_version": b"0",
    "byteorder": b"little",
    ".data/version": b"6\n",
}
IGNORED_MEMBERS = {".data/serialization_id", ".format_version", ".storage_alignment", "version"}

# how large a tensor of stride 0 may be that is stored as a few numbers
EXPANDED_BYTES = 64 * 2**20
# torch._export.serde.schema.ScalarType: numbers written to files, so they never change their meaning
SCALAR_TYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7:
        torch.float32,
    8: torch.float64, 9: torch.complex32, 10: torch.complex64, 11: torch.complex128, 12: torch.bool,
    13: torch.bfloat16,
}  # fmt: skip


class RefusedArchiveError(Exception):
    """The archive holds something that could run code; the message says what and where in it."""


class UnreadableArchiveError(Exception):
    """The archive is damaged, or of a form this version does not know."""


@dataclass(frozen=True)
class Archive:
    """The members of an archive, its root folder taken off."""

    members: Mapping[str, bytes]

    def json(self, name: str) -> Any:
        """A member parsed as JSON.

        Raises:
            UnreadableArchiveError: it is missing or no JSON.
        """
        try:
            return json.loads(self.members[name])
        except KeyError as cause:
            raise UnreadableArchiveError(f"it has no {name}") from cause
        except (ValueError, RecursionError) as cause:
            raise UnreadableArchiveError(f"{name} is no JSON, or nested too deeply") from cause


def read_archive(data: bytes) -> Archive:
    """The members of a torch.export archive.

    Raises:
        UnreadableArchiveError: it is no complete zip file, has two roots, names a member twice, or would take more
            memory than it has bytes.
    """
    members: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            roots = {name.partition("/")[0] for name in names}
            if len(roots) != 1 or len(set(names)) != len(names):
                raise UnreadableArchiveError("its members are not under one root, each once")
            # torch compresses nothing; what is compressed, or stored once and named often, may unfold to any size
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise UnreadableArchiveError("a member is compressed, which torch.export never writes")
            if sum(entry.file_size for entry in archive.infolist()) > len(data):
                raise UnreadableArchiveError("its members claim more bytes than it has")
            for name in names:
                members[name.partition("/")[2]] = archive.read(name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as cause:
        raise UnreadableArchiveError(f"it is no complete zip file ({cause})") from cause
    return Archive(members)


def write_archive(members: Mapping[str, bytes]) -> bytes:
    """The members as a zip file that torch reads."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(f"{ROOT}/{name}"), content)
    return buffer.getvalue()


@dataclass(frozen=True)
class Extent:
    """Where in its storage a tensor lies."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Bytes of the storage up to the tensor's last element; 0 for a tensor without any."""
        if 0 in self.sizes:
            return 0
        last = sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))
        return (self.offset + last + 1) * self.dtype.itemsize


def extent_of(name: str, entry: Mapping[str, Any]) -> Extent:
    """The extent of a tensor, from its entry in a config of weights or constants.

    Raises:
        UnreadableArchiveError: sizes, strides or dtype are missing, negative, or repeat a few numbers without end.
    """
    try:
        meta = entry["tensor_meta"]
        sizes, strides = (tuple(item["as_int"] for item in meta[key]) for key in ("sizes", "strides"))
        extent = Extent(SCALAR_TYPES[meta["dtype"]], sizes, strides, meta["storage_offset"]["as_int"])
    except (KeyError, TypeError) as cause:
        raise UnreadableArchiveError(f"the weight {name} has no known size or dtype ({cause})") from cause
    numbers = (*sizes, *strides, extent.offset)
    if len(sizes) != len(strides) or not all(type(number) is int and number >= 0 for number in numbers):
        raise UnreadableArchiveError(f"the weight {name} has sizes {list(sizes)} and strides {list(strides)}")
    if math.prod(sizes) * extent.dtype.itemsize > max(extent.bytes, EXPANDED_BYTES):
        raise UnreadableArchiveError(f"the weight {name} of sizes {list(sizes)} repeats a few numbers without end")
    return extent


def member_sizes(archive: Archive, folder: str, config: Mapping[str, Any]) -> dict[str, int]:
    """Member to the bytes that its tensors take; several may share one."""
    sizes: dict[str, int] = {}
    for name, entry in config["config"].items():
        path = folder + entry["path_name"]
        if path not in archive.members:
            raise UnreadableArchiveError(f"it has no {path}")
        sizes[path] = max(sizes.get(path, 0), extent_of(name, entry).bytes)
        if sizes[path] > len(archive.members[path]):
            raise UnreadableArchiveError(
                f"the weight {name} takes {sizes[path]} bytes, and {path} has {len(archive.members[path])}"
            )
    return sizes
