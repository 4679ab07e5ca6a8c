"""Parts of a stored PNG: of the form that codecmill writes, no more is undone than a part needs; of others, all.

That form is one of PNG's plainest: 8-bit RGB or grey, not interlaced, every row filtered by "Up" (type 2: each byte
less the one above it), one zlib stream in one IDAT. So a row needs those above it, but no pixel its neighbours: what
lies below the part is not inflated, and what lies beside it is not summed. Whatever else Pillow reads takes its way.
"""

import struct
from dataclasses import dataclass

import numpy as np
from isal import igzip_lib, isal_zlib

from pipelines.data.images import decode_png
from pipelines.data.picture_limits import MAX_PIXELS
from pipelines.data.png_writing import SIGNATURE, UP

CHANNELS = {0: 1, 2: 3}
"""Of PNG's colour types grey and RGB."""

_HEAD = struct.Struct(">8s I4sIIBBBBBI I4s BB")
"""Signature, the chunk IHDR, the head of the chunk IDAT, and that of the zlib stream in it."""

_STREAM = _HEAD.size - 2
"""Where the zlib stream begins."""

_TAIL = bytes.fromhex("00000000 49454e44 ae426082")
"""The chunk IEND, with which a PNG ends."""


class StoredPicture:
    """A picture (8-bit, RGB or grey) in the PNG bytes that codecmill stored.

    Several threads may read it, but none while `decode` runs.

    Attributes:
        width, height: in pixels.
        channels: 3 of an RGB picture, 1 of a grey one.

    Raises:
        ImageError: it was not stored by codecmill, for it is damaged, too large, or of another mode.
    """

    def __init__(self, content: bytes | memoryview):
        self._content = memoryview(content)
        self._plain = _Plain.recognise(self._content)
        self._levels: np.ndarray | None = None
        if self._plain:
            self.height, self.width, self.channels = self._plain.shape
        else:
            self._levels = _by_pillow(self._content)
            self.height, self.width, self.channels = self._levels.shape

    def part(self, left: int, top: int, width: int, height: int) -> np.ndarray:
        """The levels of a part that lies inside, (height, width, channels) uint8, not to be written to.

        Raises:
            ImageError: as the class.
        """
        levels = self._levels
        if levels is None and self._plain:
            part = self._plain.part(self._content, left, top, width, height)
            if part is not None:
                return part
        if levels is None:
            levels = self._levels = _by_pillow(self._content)
        return levels[top : top + height, left : left + width]

    def decode(self) -> None:
        """Undo all of it now, and keep its levels instead of its bytes."""
        self._levels = self.part(0, 0, self.width, self.height)
        self._content = memoryview(b"")


@dataclass(frozen=True)
class _Plain:
    """A PNG that has the form above, as far as its chunks tell.

    Attributes:
        shape: height, width, channels.
        start, stop: where its deflate stream lies in the file, in bytes.
    """

    shape: tuple[int, int, int]
    start: int
    stop: int

    @classmethod
    def recognise(cls, content: memoryview) -> "_Plain | None":
        if len(content) < _HEAD.size + 4 + len(_TAIL):
            return None
        signature, length, name, width, height, depth, colour, *ways, crc, size, idat, method, flags = (
            _HEAD.unpack_from(content)
        )
        end = _STREAM + size
        is_plain = (
            (signature, length, name, idat) == (SIGNATURE, 13, b"IHDR", b"IDAT")
            and (depth, colour in CHANNELS, ways) == (8, True, [0, 0, 0])
            and 0 < width * height <= MAX_PIXELS
            and (end + 4 + len(_TAIL), content[-len(_TAIL) :]) == (len(content), _TAIL)
            and crc == isal_zlib.crc32(content[12:29])
            and content[end : end + 4] == isal_zlib.crc32(content[_STREAM - 4 : end]).to_bytes(4)
            # Deflate with a window of up to 32 KiB, and without a dictionary (RFC 1950).
            and (method & 15, method >> 4 < 8, (method * 256 + flags) % 31, flags & 32) == (8, True, 0, 0)
        )
        return cls((height, width, CHANNELS[colour]), _STREAM + 2, end) if is_plain else None

    def part(self, content: memoryview, left: int, top: int, width: int, height: int) -> np.ndarray | None:
        """As `StoredPicture.part`; None where the stream or a filter is another one than it seemed."""
        _, across, channels = self.shape
        rows, stride = top + height, 1 + across * channels
        inflator = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_DEFLATE)
        try:
            # What is never inflated takes no memory above 16 MiB, whatever the header says of the size.
            filtered = inflator.decompress(content[self.start : self.stop], rows * stride)
        except igzip_lib.error:  # pyright: ignore[reportGeneralTypeIssues]
            return None
        if len(filtered) < rows * stride:
            return None
        lines = np.frombuffer(filtered, np.uint8).reshape(rows, stride)
        if (lines[:, 0] != UP).any():
            return None
        needed = lines[:, 1 + left * channels : 1 + (left + width) * channels]
        differences = needed[top:].copy()
        np.add.reduce(needed[: top + 1], axis=0, dtype=np.uint8, out=differences[0])
        return _running_sums(differences).reshape(height, width, channels)


def _running_sums(rows: np.ndarray) -> np.ndarray:
    """The sums of rows 0 ... i modulo 256, of (N, M) uint8, which is written over.

    By doubling (Hillis and Steele, "Data parallel algorithms", 1986): `np.add.accumulate` goes column by column, and
    takes twice as long for all its fewer additions.
    """
    other, reach = np.empty_like(rows), 1
    while reach < len(rows):
        other[:reach] = rows[:reach]
        np.add(rows[reach:], rows[:-reach], out=other[reach:])
        rows, other, reach = other, rows, 2 * reach
    return rows


def _by_pillow(content: memoryview) -> np.ndarray:
    levels = np.asarray(decode_png(content))
    return levels.reshape(*levels.shape[:2], -1)
