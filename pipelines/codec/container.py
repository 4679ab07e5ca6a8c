"""The file of a coded picture, `.cmill`: what a reader must know, and the coded symbols, each under its checksum.

Little-endian: magic `CMIL`, version (1 byte), width and height (4 bytes each), 256 log2 of the quantiser's step in grey
levels (2 bytes, 256 to 2048: steps from 2 to 256), sha256 of the model's weights (32 bytes), bytes of the payload (4
bytes), CRC-32 of all before it (4 bytes), the payload, CRC-32 of the payload (4 bytes).
"""

import struct
import zlib
from dataclasses import dataclass, replace

from pipelines.config import LARGEST_STEP, SMALLEST_STEP
from pipelines.data.picture_limits import MAX_PIXELS
from pipelines.errors import InputError

MAGIC = b"CMIL"
VERSION = 1
SUFFIX = ".cmill"

_HEADER = struct.Struct("<4sBIIH32sI")
_CRC = struct.Struct("<I")
OVERHEAD = _HEADER.size + 2 * _CRC.size
"""Bytes of a file beyond its payload."""
HEAD = _HEADER.size + _CRC.size
"""Bytes of a file before its payload: they say what the rest must be."""

MOST_BYTES_PER_PIXEL, BLOCK = 64, 64
"""Of a payload, and the pixels to which each side counts as rounded up, as no latent covers more. Uncompressed a
picture has 3 bytes a pixel: more than twenty times that is no picture, but takes the memory of whoever reads it."""

MOST_COVERED = 2 * MAX_PIXELS
"""Pixels of a picture whose sides are rounded up to `BLOCK`: a row of one pixel takes as much memory as one of 64."""

LIMITS = (
    f"there must be some, {MAX_PIXELS:,} at most, and {MOST_COVERED:,} at most with both sides rounded up to {BLOCK}"
)
"""What `is_allowed` asks for, in words."""


@dataclass(frozen=True)
class CodedPicture:
    """What a file holds.

    Attributes:
        width, height: in pixels.
        step: 256 log2 of the quantiser's step in grey levels.
        model: sha256 of the weights of the model that wrote it, hexadecimal.
        payload: its symbols, as the range coder left them.
    """

    width: int
    height: int
    step: int
    model: str
    payload: bytes

    def to_bytes(self) -> bytes:
        """The content of a file."""
        header = _HEADER.pack(
            MAGIC, VERSION, self.width, self.height, self.step, bytes.fromhex(self.model), len(self.payload)
        )
        return header + _CRC.pack(zlib.crc32(header)) + self.payload + _CRC.pack(zlib.crc32(self.payload))


def most_bytes(width: int, height: int) -> int:
    """Of the payload of a picture, its size in pixels."""
    return MOST_BYTES_PER_PIXEL * _covered(width, height)


def is_allowed(width: int, height: int) -> bool:
    """Whether a file may hold a picture of this size, in pixels: larger ones are neither written nor read."""
    return 0 < width * height <= MAX_PIXELS and _covered(width, height) <= MOST_COVERED


def _covered(width: int, height: int) -> int:
    return (-(-width // BLOCK) * BLOCK) * (-(-height // BLOCK) * BLOCK)


def parse(content: bytes, name: str) -> CodedPicture:
    """The picture in a file's content.

    Args:
        name: of the file, for messages.

    Raises:
        InputError: it is no such file, of another version, cut, altered, or of an impossible size or step.
    """
    without_payload, _ = parse_head(content[:HEAD], len(content), name)
    payload = content[HEAD : -_CRC.size]
    if _CRC.unpack(content[-_CRC.size :]) != (zlib.crc32(payload),):
        raise InputError(f"{name} is damaged: its content does not have the checksum that it names. Get it again.")
    return replace(without_payload, payload=payload)


def parse_head(head: bytes, size: int | None, name: str) -> tuple[CodedPicture, int]:
    """What a file's first `HEAD` bytes say: the picture without a payload, and how many bytes follow the head.

    Args:
        size: of the whole file, in bytes; None where that is not known yet.

    Raises:
        InputError: as of `parse`, but for an altered payload.
    """
    if not head.startswith(MAGIC):
        raise InputError(f"{name} is no {SUFFIX} file: it does not begin with {MAGIC.decode()}.")
    if len(head) < HEAD or (size is not None and size < OVERHEAD):
        found = len(head) if size is None else size
        raise InputError(f"{name} is cut off: it has {found} bytes. Get the whole file again.")
    header = head[: _HEADER.size]
    _, version, width, height, step, model, length = _HEADER.unpack(header)
    if version != VERSION:
        raise InputError(f"{name} is of version {version}, but this codecmill reads version {VERSION}: update it.")
    if _CRC.unpack_from(head, _HEADER.size) != (zlib.crc32(header),):
        raise InputError(f"{name} is damaged: its header does not have the checksum that it names. Get it again.")
    if size not in (None, OVERHEAD + length):
        raise InputError(
            f"{name} is cut off or has something added: it has {size} bytes, but was written with "
            f"{OVERHEAD + length}. Get it again."
        )
    if not is_allowed(width, height):
        raise InputError(f"{name} claims {width} x {height} pixels; {LIMITS}.")
    if not SMALLEST_STEP <= 2 ** (step / 256) <= LARGEST_STEP:
        raise InputError(
            f"{name} claims a quantiser step of {2 ** (step / 256):.4g} grey levels; there are {SMALLEST_STEP:g} to "
            f"{LARGEST_STEP:g}."
        )
    if length > most_bytes(width, height):
        raise InputError(
            f"{name} claims {length:,} bytes for {width} x {height} pixels, more than any picture needs. Get it again."
        )
    return CodedPicture(width, height, step, model.hex(), b""), length + _CRC.size
