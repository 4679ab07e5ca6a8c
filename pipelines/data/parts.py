"""Parts: what becomes of one source, a file each, whole or absent, until the shards are put together of them.

A part is the source's samples as they will lie in the tar, then a description in JSON, then the description's length in
8 bytes (little-endian). One file a source, for on many disks to make and to delete a file costs more than a patch.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from pydantic import TypeAdapter, ValidationError

from pipelines.data.shard_format import Split, canonical


@dataclass(frozen=True)
class Part:
    """What became of one source, and where the samples lie in its part; the columns of `spans` are those of SPAN."""

    sha256: str
    split: Split
    status: Literal["used", "skipped", "broken"]
    reason: str = ""
    width: int = 0
    height: int = 0
    tar_bytes: int = 0
    pixels: int = 0
    sums: list[int] = field(default_factory=lambda: [0, 0, 0])
    squares: list[int] = field(default_factory=lambda: [0, 0, 0])
    pixels_sha256: str | None = None
    samples: int = 0
    note: str = ""
    spans: list[list[int]] = field(default_factory=list)


PART = ".part"
_PART = TypeAdapter(Part)
_LENGTH = struct.Struct("<Q")


def part_file(folder: Path, sha256: str, split: str) -> Path:
    return folder / f"{sha256}.{split}{PART}"


def read_part(folder: Path, sha256: str, split: str) -> Part | None:
    """The description of a source's complete part, or None."""
    try:
        with part_file(folder, sha256, split).open("rb") as stream:
            size = stream.seek(-_LENGTH.size, os.SEEK_END) + _LENGTH.size
            (length,) = _LENGTH.unpack(stream.read())
            start = stream.seek(size - _LENGTH.size - length)
            part = _PART.validate_json(stream.read(length))
            return part if part.tar_bytes == start else None
    except (OSError, ValueError, ValidationError):  # absent, or cut: a seek before its beginning
        return None


@contextmanager
def writing_part(file: Path) -> Iterator[IO[bytes]]:
    """A stream that takes a part's samples and then `describe`; the part is there when all went well."""
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")
    try:
        with temporary.open("wb") as stream:
            yield stream
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def describe(stream: IO[bytes], part: Part) -> None:
    """Write what comes after the samples."""
    description = canonical(vars(part))
    stream.write(description + _LENGTH.pack(len(description)))
