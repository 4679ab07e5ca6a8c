"""The PNG files in shards: plain to other readers, of the promised form, the same bytes on every processor."""

import shutil
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path
from typing import get_args

import deflate
import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from torchvision.io import ImageReadMode, decode_png
from zlib_ng import zlib_ng

from pipelines.data import png_writing
from pipelines.data.png_writing import Compression, write_png

SIZES = [(1, 1), (1, 40), (53, 1), (64, 48)]
COMPRESSIONS = get_args(Compression)


def chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """Kind and content of a PNG's chunks, by its specification."""
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    found, place = [], 8
    while place < len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        body = content[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", content, place + 8 + length)[0] == zlib.crc32(kind + body)
        found.append((kind, body))
        place += 12 + length
    return found


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")  # torchvision's libpng is there still
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pillow_and_libpng_read_the_same_pixels(mode: str, compression: Compression):
    for width, height in SIZES:
        image = picture(width, width, height).convert(mode)
        content = write_png(image, compression)
        read = Image.open(BytesIO(content))
        assert (read.format, read.mode, read.tobytes()) == ("PNG", mode, image.tobytes())
        by_libpng = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED)
        assert by_libpng.permute(1, 2, 0).numpy().tobytes() == image.tobytes()


@pytest.mark.parametrize(("mode", "colour_type", "channels"), [("RGB", 2, 3), ("L", 0, 1)])
def test_the_form_is_one_stream_of_rows_that_tell_the_difference_to_the_row_above(
    mode: str, colour_type: int, channels: int
):
    image = picture(5, 30, 20).convert(mode)
    header, data, end = chunks(write_png(image))
    assert header == (b"IHDR", struct.pack(">IIBBBBB", 30, 20, 8, colour_type, 0, 0, 0))
    assert end == (b"IEND", b"")
    assert data[0] == b"IDAT"
    rows = np.frombuffer(zlib.decompress(data[1]), dtype=np.uint8).reshape(20, 1 + 30 * channels)
    assert (rows[:, 0] == 2).all()
    assert np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8).tobytes() == image.tobytes()


def test_small_is_smaller_and_large_pictures_are_left_to_pillow(monkeypatch: pytest.MonkeyPatch):
    image = Image.fromarray(np.asarray(picture(6, 128, 128)) // 32 * 32)
    fast, small = write_png(image, "fast"), write_png(image, "small")
    assert len(small) < 0.99 * len(fast)
    monkeypatch.setattr(png_writing, "LARGEST", 128 * 128 - 1)
    whole = write_png(image)
    file = BytesIO()
    image.save(file, "PNG", compress_level=4)
    assert whole == file.getvalue()


def test_noise_is_coded_by_how_frequent_its_values_are_and_not_searched():
    # Its halves are equal, so that whoever searches needs half. Frequencies alone cannot fall below Shannon's entropy.
    half = np.random.Generator(np.random.Philox(1)).integers(0, 64, (128, 64, 3), dtype=np.uint8)
    noise = Image.fromarray(np.concatenate([half, half], axis=1))
    fast, small = write_png(noise, "fast"), write_png(noise, "small")
    assert len(small) < 0.6 * len(fast)
    rows = np.frombuffer(zlib.decompress(dict(chunks(fast))[b"IDAT"]), dtype=np.uint8)
    shares = np.bincount(rows) / len(rows)
    bits = -np.log2(shares, where=shares > 0, out=np.zeros_like(shares)) @ shares
    assert 1 < len(fast) / (bits * len(rows) / 8) < 1.03
    assert Image.open(BytesIO(fast)).tobytes() == noise.tobytes()


VERSIONS = (deflate.__version__, str(zlib_ng.ZLIBNG_RUNTIME_VERSION))
# sha256 of what `STREAMS` compresses: libdeflate's levels 1 and 6, and Huffman codes alone. Written down on a processor
# with AVX-512.
KNOWN = {
    ("0.9.0", "2.3.3"): [
        "6d963340569dfe7321160dafb0a57570d2b4a79cb8033646ce615a4fe482203c",
        "0f26b2030351f1825e384951cc378c29c3aa44a95002942add62b09ca5f9dea2",
        "d24d29051643572a0ec15af957c2cc9e1c2da5a44ea8fdd74a4289deabede5c1",
    ],
}
STREAMS = """
import hashlib
def rows():
    state, content = 1, bytearray()
    for place in range(60_000):
        state = (state * 1103515245 + 12345) % 2**31
        content.append((state >> 16) % (2 + place // 300) if place % 1000 < 700 else place % 7)
    return bytes(content)
import deflate
from zlib_ng import zlib_ng
coder = zlib_ng.compressobj(level=1, memLevel=9, strategy=zlib_ng.Z_HUFFMAN_ONLY)
found = [deflate.zlib_compress(rows(), level) for level in (1, 6)] + [coder.compress(rows()) + coder.flush()]
print(*(hashlib.sha256(stream).hexdigest() for stream in found))
"""


def streams(*command: str) -> list[str]:
    # Isolated and without site: what starts on a processor of long ago is not numpy.
    code = f"import sys; sys.path.append({str(Path(deflate.__file__).parent.parent)!r}){STREAMS}"
    done = subprocess.run([*command, sys.executable, "-I", "-S", "-c", code], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().split()


@pytest.mark.skipif(VERSIONS not in KNOWN, reason="other versions of the encoders make other shard sets")
def test_the_streams_bytes_are_those_of_other_machines():
    assert streams() == KNOWN[VERSIONS]


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="needs Debian's qemu-user")
@pytest.mark.parametrize("processor", ["core2duo", "Westmere", "Haswell"])
def test_bytes_are_the_same_whatever_the_processor_can_do(processor: str):
    assert streams("qemu-x86_64", "-cpu", processor) == streams()
