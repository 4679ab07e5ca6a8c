"""Source images of the plainest kind, 8-bit RGB PNG, decoded in half of Pillow's time to the pixels that Pillow gives.

Anything that is odd in a file is a reason to leave it to Pillow, which then reads it or says what is wrong with it.
"""

import struct
from collections.abc import Iterator
from contextlib import suppress

import deflate
import numpy as np
import pyspng

from pipelines.data.png_writing import SIGNATURE, chunk

LARGEST = 2**25
"""Pixels. Larger pictures are left to Pillow, which needs less memory for them."""

MAX_CHUNKS = 100_000
"""More are left to Pillow: libpng writes one for 8 kB, so real pictures of `LARGEST` pixels have 12,000 at most."""

LONGEST_REMARK = 512
"""Bytes of a text. Pillow refuses a file with 64 MB of them, which `MAX_CHUNKS` of these do not reach."""

_BEGIN = SIGNATURE + b"\0\0\0\rIHDR"
_AFTER_HEADER = 33
_RGB8 = bytes((8, 2, 0, 0, 0))
"""Depth, colour type, compression, filter method, interlacing."""

_SILENT = frozenset({b"sRGB", b"gAMA", b"cHRM", b"pHYs", b"tIME", b"bKGD"})
"""Chunks from which Pillow takes nothing that changes a pixel."""

_REMARKS = frozenset(
    {b"Software", b"Title", b"Author", b"Description", b"Copyright", b"Comment", b"Creation Time", b"Source"}
    | {b"date:create", b"date:modify", b"date:timestamp"}
)
"""Texts that mean nothing to Pillow; others may hold an orientation."""


def decode_plain_png(content: bytes) -> np.ndarray | None:
    """(H, W, 3) uint8 of a plain PNG, for which Pillow gives the same; None for anything else.

    The zlib stream is undone by libdeflate, and wrapped again without compression for libspng, whose own way is slow
    there but quick in undoing the filters.
    """
    size = _size(content)
    if size is None:
        return None
    # Whatever these two do not like, damaged or only odd, is Pillow's to judge.
    with suppress(Exception):
        return pyspng.load(_uncompressed(content, *size))
    return None


def _size(content: bytes) -> tuple[int, int] | None:
    """Width and height of a plain PNG that is not too large."""
    if content[:16] != _BEGIN or content[24:29] != _RGB8:
        return None
    width, height = struct.unpack_from(">II", content, 16)
    return (width, height) if 0 < width * height <= LARGEST else None


def _data(content: bytes) -> Iterator[bytes]:
    """The content of each IDAT chunk.

    Raises:
        ValueError: something in the file is not plain.
    """
    place, stage = _AFTER_HEADER, 0
    for _ in range(MAX_CHUNKS):
        length, kind = struct.unpack_from(">I4s", content, place)
        body = content[place + 8 : place + 8 + length]
        if len(body) < length:
            raise ValueError("it is cut short")
        if kind == b"IEND":
            return
        now = 1 if kind == b"IDAT" else 2 if stage else 0
        if now < stage or not (now == 1 or _means_nothing(kind, body, now)):
            raise ValueError(f"{kind!r} may mean something")
        if now == 1:
            yield body
        place, stage = place + 12 + length, now
    raise ValueError(f"it has more than {MAX_CHUNKS} chunks")


def _means_nothing(kind: bytes, body: bytes, stage: int) -> bool:
    """Whether Pillow takes nothing from a chunk before (stage 0) or after (stage 2) the pixels that changes them."""
    if kind == b"tEXt":
        return body.partition(b"\0")[0] in _REMARKS and len(body) <= LONGEST_REMARK
    return kind in _SILENT and stage == 0


def _uncompressed(content: bytes, width: int, height: int) -> bytes:
    """The same picture, its zlib stream without compression.

    Nothing of the way there has a name for longer than it is needed, so that it takes 6 bytes a pixel.

    Raises:
        ValueError: something in the file is not plain, or damaged.
    """
    data = b"".join(_data(content))
    stream = deflate.zlib_compress(deflate.zlib_decompress(data, height * (1 + 3 * width)), 0)
    return b"".join([content[:_AFTER_HEADER], *chunk(b"IDAT", stream), *chunk(b"IEND", b"")])
