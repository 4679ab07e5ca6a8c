"""Parts of stored PNGs: the pixels that Pillow sees, whatever the form, and no more work than a part needs."""

import struct
import tracemalloc
import zlib
from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines.data import png_reading
from pipelines.data.images import ImageError
from pipelines.data.png_reading import StoredPicture

UP = 2
RANDOM = np.random.Generator(np.random.Philox(5))
COLOURED = RANDOM.integers(0, 256, (24, 19, 3), dtype=np.uint8)
GREY = COLOURED[..., :1]


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def rows(levels: np.ndarray, filters: list[int]) -> bytes:
    """The rows of a PNG, each with its filter: none, Sub, Up, Average, Paeth, as the standard defines them."""
    x = np.pad(levels.astype(int), ((1, 0), (1, 0), (0, 0)))
    here, left, above, corner = x[1:, 1:], x[1:, :-1], x[:-1, 1:], x[:-1, :-1]
    near = [abs(left + above - corner - each) for each in (left, above, corner)]
    paeth = np.where((near[0] <= near[1]) & (near[0] <= near[2]), left, np.where(near[1] <= near[2], above, corner))
    guesses = [0 * here, left, above, (left + above) // 2, paeth]
    differences = [((here - guess) % 256).astype(np.uint8) for guess in guesses]
    return b"".join(bytes([how]) + differences[how][row].tobytes() for row, how in enumerate(filters))


def encoded(levels: np.ndarray, filters: list[int] | int = UP, pieces: int = 1, before: bytes = b"") -> bytes:
    """A PNG of levels (H, W, 3) or (H, W, 1); in the form that is read in parts, where nothing else is asked for."""
    height, width, channels = levels.shape
    stream = zlib.compress(rows(levels, [filters] * height if isinstance(filters, int) else filters), 1)
    cuts = [round(i * len(stream) / pieces) for i in range(pieces + 1)]
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    data = b"".join(chunk(b"IDAT", stream[a:b]) for a, b in pairwise(cuts))
    return png(header, before + data)


def interlaced_pair() -> bytes:
    """Two pixels side by side, which Adam7 puts into passes of their own."""
    stream = zlib.compress(rows(COLOURED[:1, :1], [UP]) + rows(COLOURED[:1, 1:2], [UP]))
    return png(struct.pack(">IIBBBBB", 2, 1, 8, 2, 0, 0, 1), chunk(b"IDAT", stream))


def png(header: bytes, rest: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rest + chunk(b"IEND", b"")


def by_pillow(content: bytes) -> np.ndarray:
    levels = np.asarray(Image.open(BytesIO(content)))
    return levels.reshape(*levels.shape[:2], -1)


@pytest.fixture
def without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(content: bytes) -> Image.Image:
        raise AssertionError("Pillow was asked")

    monkeypatch.setattr(png_reading, "decode_png", refused)


@pytest.mark.parametrize("levels", [COLOURED, GREY], ids=["RGB", "grey"])
@pytest.mark.usefixtures("without_pillow")
def test_any_part_of_the_stored_form_is_that_of_the_picture(levels: np.ndarray):
    content = encoded(levels)
    assert np.array_equal(by_pillow(content), levels), "the test's own encoder writes PNG"
    picture = StoredPicture(content)
    assert (picture.width, picture.height, picture.channels) == (19, 24, levels.shape[2])
    for top in range(24):
        for left, width, height in [(0, 19, 24 - top), (top % 19, 1, 1), (3, 8, (24 - top + 1) // 2)]:
            part = picture.part(left, top, width, height)
            assert np.array_equal(part, levels[top : top + height, left : left + width])
    picture.decode()
    once, again = picture.part(2, 3, 4, 5), picture.part(2, 3, 4, 5)
    assert np.array_equal(once, levels[3:8, 2:6])
    assert np.shares_memory(once, again)


@given(filters=st.lists(st.integers(0, 4), min_size=24, max_size=24), is_grey=st.booleans(), pieces=st.integers(1, 3))
def test_other_filters_and_pieces_are_read_alike(filters: list[int], is_grey: bool, pieces: int):
    levels = GREY if is_grey else COLOURED
    picture = StoredPicture(encoded(levels, filters, pieces))
    assert np.array_equal(picture.part(5, 7, 11, 13), levels[7:20, 5:16])
    assert np.array_equal(picture.part(0, 0, 19, 24), levels)


def test_other_forms_are_read_alike():
    by_level = [BytesIO() for _ in range(3)]
    for level, file in enumerate(by_level):
        Image.fromarray(COLOURED).save(file, "PNG", compress_level=3 * level)
    files = [(file.getvalue(), COLOURED) for file in by_level]
    files += [(interlaced_pair(), COLOURED[:1, :2]), (encoded(GREY, before=chunk(b"tEXt", b"a\0b")), GREY)]
    for content, levels in files:
        assert np.array_equal(StoredPicture(content).part(0, 0, *levels.shape[1::-1]), levels)
    palette = BytesIO()
    Image.fromarray(COLOURED).quantize(4).save(palette, "PNG")
    deep = png(struct.pack(">IIBBBBB", 1, 2, 16, 0, 0, 0, 0), chunk(b"IDAT", zlib.compress(b"\2\2\2\2\0\0")))
    for content, mode in ((palette.getvalue(), "P"), (deep, "I;16")):
        with pytest.raises(ImageError, match=f"has mode {mode}; codecmill stores RGB and L"):
            StoredPicture(content).part(0, 0, 1, 2)


def test_nothing_below_a_part_is_inflated():
    """Cut short in the middle, with checksums that fit: what is there is read, the rest is an error."""
    tall = RANDOM.integers(0, 256, (400, 19, 3), dtype=np.uint8)
    whole = encoded(tall)
    stream = whole[41:-16][: len(whole) // 2]
    content = whole[:33] + chunk(b"IDAT", stream) + whole[-12:]
    picture = StoredPicture(content)
    assert np.array_equal(picture.part(2, 100, 16, 50), tall[100:150, 2:18])
    with pytest.raises(ImageError, match=r"A stored picture of \d+ bytes cannot be decoded: "):
        picture.part(0, 0, 19, 400)


@pytest.mark.parametrize("levels", [COLOURED, GREY], ids=["RGB", "grey"])
def test_a_changed_header_is_noticed(levels: np.ndarray):
    """Any bit of what stands before the stream; of the IDAT's name and length too, and of its checksum behind it."""
    content = encoded(levels)
    for bit in range(8 * 41):
        same_or_refused(content, bit // 8, 1 << bit % 8)


@given(place=st.integers(0, 10_000), mask=st.integers(1, 255))
def test_a_changed_byte_is_noticed(place: int, mask: int):
    same_or_refused(encoded(COLOURED), place, mask)


def same_or_refused(content: bytes, place: int, mask: int) -> None:
    changed = bytearray(content)
    changed[place % len(content)] ^= mask
    try:
        picture = StoredPicture(bytes(changed))
        levels = picture.part(0, 0, picture.width, picture.height)
    except ImageError:
        return
    assert np.array_equal(levels, by_pillow(bytes(changed)))


@given(stream=st.binary(max_size=200), width=st.integers(1, 9), height=st.integers(1, 9))
def test_any_stream_under_fitting_checksums_is_levels_or_an_error(stream: bytes, width: int, height: int):
    rows_and_more = b"".join(b"\2" + stream[i : i + width] for i in range(0, len(stream), width))
    for data in (b"\x78\x01" + stream, zlib.compress(rows_and_more)[:-4] + stream[:4]):
        content = png(struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), chunk(b"IDAT", data))
        try:
            assert StoredPicture(content).part(0, 0, width, height).shape == (height, width, 1)
        except ImageError:
            continue


def test_a_header_that_claims_much_takes_little():
    """Of Python's memory; Pillow, which is asked for its opinion, makes room for a picture up to its bound."""
    for side, said in ((2**31 - 1, "exceeds limit"), (8192, "cannot be decoded")):
        content = png(struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), encoded(COLOURED)[33:-12])
        tracemalloc.start()
        with pytest.raises(ImageError, match=said):
            StoredPicture(content).part(0, 0, side, side)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
        tracemalloc.stop()
