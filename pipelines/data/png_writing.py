"""The PNG files in shards, in a form that is quick to write, and to read in parts: see `png_reading`.

A picture of up to `LARGEST` pixels is 8-bit RGB or grey, not interlaced; every row has filter type 2 (Up), the
difference to the row above, which one subtraction writes and one running sum undoes; all rows are one zlib stream in
one IDAT chunk, and there is no chunk but IHDR, IDAT and IEND. It is a plain PNG to everything that reads PNG.

The stream is libdeflate's; or, of pictures full of noise where `fast` is asked for, zlib-ng's Huffman codes alone. Both
were found to give equal bytes on every processor: on seven models of x86-64 from Core 2 to AVX-512, and on two of ARM.
ISA-L, twice as fast, gives other bytes on some of them.
"""

import struct
from io import BytesIO
from typing import Literal

import deflate
import numpy as np
from isal import isal_zlib
from PIL import Image
from zlib_ng import zlib_ng

Compression = Literal["fast", "small"]

LEVELS: dict[Compression, int] = {"fast": 1, "small": 6}
"""libdeflate's effort. On photographs its level 1 takes a third of the time of level 6 for some 6 % more bytes."""

NOISE = 0.9
"""Share of filtered bytes that differ from zero, from which `fast` does not search for repetitions.

There it finds few: on photographs such patches, four of ten, take 0.6 of the time so, for a tenth more bytes.
"""

PILLOW_LEVEL = 4
"""zlib's effort in larger pictures, which Pillow writes row by row: libdeflate takes and gives them whole."""

LARGEST = 2**25
"""Pixels. So a picture's way to PNG takes 300 MB at most."""

WRITER = (
    f"deflate {deflate.__version__}: up, {LEVELS['fast']}, {LEVELS['small']}; "
    f"zlib-ng {zlib_ng.ZLIBNG_RUNTIME_VERSION}: {NOISE}; zlib {PILLOW_LEVEL} over {LARGEST}"
)
"""All that decides on the bytes beside the pixels, and beside Pillow; a part of a shard set's name."""

SIGNATURE = b"\x89PNG\r\n\x1a\n"
UP = 2
"""The type of a row's filter."""

_COLOUR_TYPES = {"L": 0, "RGB": 2}


def write_png(image: Image.Image, compression: Compression = "fast") -> bytes:
    """A picture (mode RGB or L) as PNG, without loss and without anything but its pixels.

    Equal pixels are equal bytes, on any machine, as long as `WRITER` and the version of Pillow are the same.
    """
    if image.width * image.height > LARGEST:
        file = BytesIO()
        image.save(file, format="PNG", compress_level=PILLOW_LEVEL)
        return file.getvalue()
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, _COLOUR_TYPES[image.mode], 0, 0, 0)
    stream = _stream(_filtered(np.asarray(image)), compression)
    return b"".join([SIGNATURE, *chunk(b"IHDR", header), *chunk(b"IDAT", stream), *chunk(b"IEND", b"")])


def _filtered(levels: np.ndarray) -> np.ndarray:
    """(H, W, 3) or (H, W) uint8 as (H, 1 + bytes of a row): the filter's type, then differences modulo 256."""
    rows = levels.reshape(len(levels), -1)
    filtered = np.empty((rows.shape[0], 1 + rows.shape[1]), dtype=np.uint8)
    filtered[:, 0] = UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    return filtered


def _stream(filtered: np.ndarray, compression: Compression) -> bytes | bytearray:
    """All rows as one zlib stream."""
    if compression == "fast" and np.count_nonzero(filtered) > NOISE * filtered.size:
        return _huffman_coded(filtered)
    return deflate.zlib_compress(filtered, LEVELS[compression])


def _huffman_coded(filtered: np.ndarray) -> bytes:
    coder = zlib_ng.compressobj(level=1, memLevel=9, strategy=zlib_ng.Z_HUFFMAN_ONLY)
    return coder.compress(filtered) + coder.flush()


def chunk(kind: bytes, content: bytes | bytearray) -> list[bytes | bytearray]:
    """The pieces of a PNG chunk."""
    checksum = isal_zlib.crc32(content, isal_zlib.crc32(kind))
    return [struct.pack(">I", len(content)), kind, content, struct.pack(">I", checksum)]
