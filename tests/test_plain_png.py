"""Plain PNG sources: the fast decoder gives Pillow's pixels, and leaves all that is odd to Pillow."""

import struct
import zlib
from collections.abc import Sequence
from io import BytesIO

import numpy as np
import pytest
from conftest import picture
from PIL import Image, PngImagePlugin

from pipelines.data import plain_png
from pipelines.data.images import ImageError, open_image
from pipelines.data.plain_png import decode_plain_png

WIDTH, HEIGHT = 37, 25
RANDOM = np.random.Generator(np.random.Philox(3)).integers(0, 256, (HEIGHT, 1 + 3 * WIDTH), dtype=np.uint8)
RANDOM[:, 0] = np.arange(HEIGHT) % 5  # every type of filter, over bytes of any value
STREAM = zlib.compress(RANDOM.tobytes())
Chunk = tuple[bytes, bytes]


def png(before: Sequence[Chunk], data: Sequence[bytes], after: Sequence[Chunk] = (), header: bytes = b"") -> bytes:
    """A PNG with these chunks, by its specification; the header is that of an 8-bit RGB picture."""
    header = header or struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)
    listed = [(b"IHDR", header), *before, *((b"IDAT", part) for part in data), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in listed
    )


def pillows(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize(
    "content",
    {
        "every filter": png([], [STREAM]),
        "in pieces": png([], [STREAM[:7], b"", STREAM[7:50], STREAM[50:]]),
        "with remarks": png(
            [(b"gAMA", b"\0\0\xb1\x8f"), (b"sRGB", b"\0"), (b"pHYs", bytes(9)), (b"tEXt", b"Software\0GIMP")],
            [STREAM],
            [(b"tEXt", b"date:create\x002026-01-01")],
        ),
    }.values(),
)
def test_plain_pictures_are_decoded_to_pillows_pixels(content: bytes):
    levels = decode_plain_png(content)
    assert levels is not None
    assert np.array_equal(levels, pillows(content))
    assert np.array_equal(np.asarray(open_image(content)), levels)


def test_what_pillow_writes_is_plain():
    for compress_level in (0, 1, 9):
        file = BytesIO()
        picture(1, 300, 200).save(file, "PNG", compress_level=compress_level)
        levels = decode_plain_png(file.getvalue())
        assert levels is not None
        assert levels.tobytes() == picture(1, 300, 200).tobytes()


def odd() -> dict[str, bytes]:
    """Pictures that Pillow reads in its own way."""
    header = struct.Struct(">IIBBBBB")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = BytesIO()
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n 20\n" + exif.tobytes().hex())
    picture(2, 30, 20).save(file, "PNG", pnginfo=info)
    grey = zlib.compress(bytes(HEIGHT * (1 + WIDTH)))
    return {
        "transparent": png([(b"tRNS", bytes(6))], [STREAM]),
        "turned": png([], [STREAM], [(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))]),
        "turned, in a text": file.getvalue(),
        "grey": png([], [grey], header=header.pack(WIDTH, HEIGHT, 8, 0, 0, 0, 0)),
        "no checksum": png([], [STREAM[:-4]]),
        "too few rows": png([], [zlib.compress(RANDOM[:-1].tobytes())]),
    }


@pytest.mark.parametrize("name", odd())
def test_what_is_odd_is_left_to_pillow(name: str, monkeypatch: pytest.MonkeyPatch):
    content = odd()[name]
    assert decode_plain_png(content) is None
    found = open_image(content)
    monkeypatch.setattr("pipelines.data.pixels.decode_plain_png", lambda _: None)
    assert found.tobytes() == open_image(content).tobytes()


def damaged() -> dict[str, bytes]:
    """Pictures in which Pillow finds a fault."""
    bad_filter = RANDOM.copy()
    bad_filter[3, 0] = 7
    return {
        "cut": png([], [STREAM])[:-400],
        "no such filter": png([], [zlib.compress(bad_filter.tobytes())]),
        "pixels in two places": png([], [STREAM[:100]], [(b"tEXt", b"Title\0"), (b"IDAT", STREAM[100:])]),
        "half a gamma": png([], [STREAM], [(b"gAMA", b"\0")]),
        "other bytes": png([], [b"no stream"]),
    }


@pytest.mark.parametrize("name", damaged())
def test_damage_has_the_reason_that_pillow_gives(name: str, monkeypatch: pytest.MonkeyPatch):
    content = damaged()[name]
    assert decode_plain_png(content) is None
    with pytest.raises(ImageError) as fast:
        open_image(content)
    monkeypatch.setattr("pipelines.data.pixels.decode_plain_png", lambda _: None)
    with pytest.raises(ImageError) as slow:
        open_image(content)
    assert str(fast.value) == str(slow.value)


def test_large_pictures_and_endless_chunks_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch):
    content = png([], [STREAM[:9], STREAM[9:]])
    monkeypatch.setattr(plain_png, "LARGEST", WIDTH * HEIGHT)
    monkeypatch.setattr(plain_png, "MAX_CHUNKS", 3)
    assert decode_plain_png(content) is not None
    monkeypatch.setattr(plain_png, "MAX_CHUNKS", 2)
    assert decode_plain_png(content) is None
    monkeypatch.setattr(plain_png, "MAX_CHUNKS", 3)
    monkeypatch.setattr(plain_png, "LARGEST", WIDTH * HEIGHT - 1)
    assert decode_plain_png(content) is None
