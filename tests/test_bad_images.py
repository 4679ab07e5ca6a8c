"""Hundreds of damaged, hostile and odd files among good ones: the shard stage ends, with every good one in it."""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make, picture
from PIL import Image
from processes import PROJECT, clean_environment

from pipelines.data.images import ImageError, open_image
from pipelines.data.picture_limits import MAX_PIXELS
from pipelines.data.shard_set import ShardSet
from pipelines.data.shards import create_shards

BOMB_SIDE = 12_000
"""A bomb of 144 million pixels: 432 MB in RGB, some kB on disk."""

# Root may read every file, but for the capabilities that let it.
POWERLESS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []

Files = dict[str, bytes]


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *more: bytes, depth: int = 8, colour: int = 0, data: bytes | None = None) -> bytes:
    """A PNG of nothing but zeros, packed by hand, so that it can be large and wrong."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    row = bytes(1 + (width * depth * {0: 1, 2: 3, 6: 4}[colour] + 7) // 8)
    packed = zlib.compress(row * height, 9) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def every_kind(number: int) -> dict[str, bytes]:
    """A picture of its own in every format that is read, by suffix."""
    image = picture(number, 80, 64)
    return {
        "png": saved(image),
        "interlaced.png": interlaced(image),
        "jpg": saved(image, "JPEG"),
        "progressive.jpg": saved(image, "JPEG", progressive=True),
        "webp": saved(image, "WEBP"),
        "tif": saved(image, "TIFF", compression="tiff_lzw"),
        "bmp": saved(image, "BMP"),
        "avif": saved(image, "AVIF"),
        "gif": saved(image.quantize(64), "GIF"),
        "ppm": saved(image, "PPM"),
    }


def interlaced(image: Image.Image) -> bytes:
    """As PNG in the seven passes of Adam7, which Pillow reads and does not write."""
    pixels = np.asarray(image)
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = [b"\0" + row.tobytes() for y, x, dy, dx in passes for row in pixels[y::dy, x::dx]]
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 1)
    body = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def good() -> Files:
    """Odd ones, and names that are odd, all of which Pillow reads."""
    files: Files = {f"good {number:02d}.png": saved(picture(number, 96, 80)) for number in range(12)}
    files |= {f"kind.{suffix}": content for suffix, content in every_kind(100).items()}
    suffixes = ["jpg", "png", "tif", "bmp", "webp", "gif", "ppm", "avif", "jpeg", "tiff"]
    files |= {
        f"wrong suffix {number}.{suffix}": content
        for number, (suffix, content) in enumerate(zip(suffixes, every_kind(101).values(), strict=True))
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        files[f"turned {orientation}.jpg"] = saved(picture(110 + orientation, 64, 48), "JPEG", exif=exif)
    small = picture(120, 64, 64)
    files |= {
        "1x1.png": saved(small.resize((1, 1))),
        "1xN.png": saved(small.crop((0, 0, 1, 64))),
        "Nx1.png": saved(small.crop((0, 0, 64, 1))),
        "16 bit.png": saved(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16)),
        "cmyk.jpg": saved(picture(121, 64, 64).convert("CMYK"), "JPEG"),
        "palette.png": saved(picture(122, 64, 64).quantize(16), transparency=bytes(range(0, 256, 16))),
        "alpha.png": saved(picture(123, 64, 64).convert("RGBA")),
        "apng.png": saved(picture(124, 64, 64), save_all=True, append_images=[picture(125, 64, 64)]),
        "animated.webp": saved(picture(126, 64, 64), "WEBP", save_all=True, append_images=[picture(127, 64, 64)]),
        "broken profile.png": saved(picture(128, 64, 64), icc_profile=b"no profile"),
        "top down.bmp": upside_down(saved(picture(129, 64, 64), "BMP")),
    }
    names = [
        "new\nline",
        "tab\t",
        "quotes\"'",
        "-flag",
        "per%cent",
        "a;b$(x)`y`",
        "日本語",
        "n" * 251,
        "trailing ",
        "*?[x]",
    ]
    return files | {f"{name}.png": saved(picture(130 + number, 64, 48)) for number, name in enumerate(names)}


def upside_down(bmp: bytes) -> bytes:
    """With a negative height, which means that the rows come from the top."""
    (height,) = struct.unpack("<i", bmp[22:26])
    return bmp[:22] + struct.pack("<i", -height) + bmp[26:]


def truncated() -> Files:
    """At every fifth of the file, in every format; at none of it they are all the same, empty file."""
    return {
        f"cut {number} at {fifth}.{suffix}": content[: len(content) * fifth // 5]
        for number in range(200, 206)
        for suffix, content in every_kind(number).items()
        for fifth in range(1, 5)
    }


def flipped() -> Files:
    """One byte changed somewhere; some are pictures still."""
    chance = np.random.default_rng(0)
    return {
        f"flipped {number}.{suffix}": content[:place] + bytes([content[place] ^ change]) + content[place + 1 :]
        for number in range(300, 310)
        for suffix, content in every_kind(number).items()
        for place, change in [(int(chance.integers(len(content))), int(chance.integers(1, 256)))]
    }


def bad() -> Files:
    """What Pillow does not read, or should not."""
    image = picture(400, 64, 64)
    jpeg, gif, bmp, webp = (
        saved(image, "JPEG"),
        saved(image.quantize(8), "GIF"),
        saved(image, "BMP"),
        saved(image, "WEBP"),
    )
    size = jpeg.index(b"\xff\xc0") + 5
    side = int(MAX_PIXELS**0.5) + 1
    bomb = zlib.compress(bytes(100_000_000))
    floats = saved(Image.new("F", (64, 64)), "TIFF")
    return {
        "empty.png": b"",
        "one byte.png": b"\x89",
        "text.png": b"not a picture\n",
        "zeros.png": bytes(1000),
        "archive.png": b"PK\x03\x04" + bytes(100),
        "tar.png": b"x.png".ljust(257, b"\0") + b"ustar\x0000" + bytes(248),
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "document.png": b"%PDF-1.4\n",
        "heif.png": b"\0\0\0\x18ftypheic" + bytes(16),
        "huge.png": png(side, side, data=zlib.compress(bytes(100))),
        "huger.png": png(2**31 - 1, 2**31 - 1, data=zlib.compress(bytes(100))),
        "huge.jpg": jpeg[:size] + b"\xff\xff\xff\xff" + jpeg[size + 4 :],
        "huge.gif": gif[:6] + b"\xff\xff\xff\xff" + gif[10:],
        "huge.bmp": bmp[:18] + struct.pack("<ii", 60_000, 60_000) + bmp[26:],
        "huge.ppm": b"P6\n60000 60000\n255\n" + bytes(100),
        "nothing.png": png(0, 0, data=b""),
        "no data.png": png(64, 64, data=b""),
        "little data.png": png(64, 64, data=zlib.compress(bytes(10))),
        "no zlib.png": png(64, 64, data=b"garbage"),
        "long chunk.png": png(64, 64)[:33] + b"\xff\xff\xff\xffIDAT" + bytes(50),
        "text bomb.png": png(64, 64, chunk(b"zTXt", b"a\0\0" + bomb)),
        "profile bomb.png": png(64, 64, chunk(b"iCCP", b"a\0\0" + bomb)),
        "huge tile.tif": tiff(64, 64, 32_768, 65_536, zlib.compress(bytes(100))),
        "riff.webp": webp[:4] + b"\xff\xff\xff\x7f" + webp[8:30],
        "loop.tif": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
        "floats.tif": floats,
        "comments.ppm": b"P3\n9 9\n255\n" + b"#" * 1_000_000,
    } | {name: content for name, (content, _) in slow().items()}


def slow() -> dict[str, tuple[bytes, str]]:
    """Some kB that would keep Pillow busy for a minute, or for hours if they were MB, and why they are refused."""
    flat = Image.new("L", (4000, 4000), 128)
    jpeg = saved(flat, "JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    index = saved(flat, "MPO", save_all=True, append_images=[Image.new("L", (8, 8))])
    start = index.index(b"MPF\0") - 4
    (length,) = struct.unpack(">H", index[start + 2 : start + 4])
    scans = jpeg[2:-2] + scan * 1_400 + b"\xff\xd9"
    segment = b"\xff\xe1" + struct.pack(">H", 20) + b"Exif\0\0" + bytes(12)
    return {
        "scans.jpg": (jpeg[:2] + scans, r"its 14\d\d scans of 4000 x 4000 pixels take too long to decode"),
        "scans of many.jpg": (
            jpeg[:2] + index[start : start + 2 + length] + scans,
            r"its 14\d\d scans of 4000 x 4000 pixels take too long to decode",
        ),
        "beside.jpg": (jpeg[:2] + segment * 100_000 + jpeg[2:], "its 100000 segments of EXIF data are more than 1000"),
        "again.tif": (
            strips(2000, 2000, bytes(2000 * 1000), 20_000),
            "its 20000 pieces cover it 10000 times",
        ),
        "remarks.ppm": (b"P3\n1000 1000\n255\n" + b"#\n" * 200_000, "its 200000 comments are more than 1000"),
    }


def strips(width: int, height: int, strip: bytes, count: int) -> bytes:
    """A grey picture, of which two strips are enough; the further ones are the same bytes."""
    offsets, sizes = 200 + len(strip), 200 + len(strip) + 4 * count
    numbers = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1, 278: height // 2}
    rows = {tag: struct.pack("<HHII", tag, 4, 1, number) for tag, number in numbers.items()}
    rows |= {tag: struct.pack("<HHII", tag, 4, count, place) for tag, place in ((273, offsets), (279, sizes))}
    entries = b"".join(rows[tag] for tag in sorted(rows))
    head = struct.pack("<2sHIH", b"II", 42, 8, len(rows)) + entries + bytes(4)
    return head.ljust(200, b"\0") + strip + struct.pack("<I", 200) * count + struct.pack("<I", len(strip)) * count


def tiff(width: int, height: int, tile_width: int, tile_height: int, tile: bytes) -> bytes:
    """A zlib-packed RGB picture of one tile, packed by hand, so that the tile can be larger than the picture."""
    numbers = {256: width, 257: height, 259: 8, 262: 2, 277: 3, 322: tile_width, 323: tile_height, 325: len(tile)}
    rows = {258: struct.pack("<HHII", 258, 3, 3, 146), 324: struct.pack("<HHII", 324, 4, 1, 152)}
    rows |= {tag: struct.pack("<HHII", tag, 4, 1, number) for tag, number in numbers.items()}
    entries = b"".join(rows[tag] for tag in sorted(rows))
    head = struct.pack("<2sHIH", b"II", 42, 8, len(rows)) + entries + bytes(4)
    return head.ljust(146, b"\0") + struct.pack("<HHH", 8, 8, 8) + tile


def special(folder: Path) -> set[str]:
    """What is no readable file at all; returns the names of those that must be named as broken."""
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()  # a folder, whatever it is called, is searched and not named
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "loop a.png").symlink_to("loop b.png")
    (folder / "loop b.png").symlink_to("loop a.png")
    (folder / "dangling.png").symlink_to("/nowhere/at/all.png")
    (folder / "around").symlink_to(folder)
    (folder / "locked.png").write_bytes(saved(picture(500, 64, 64)))
    (folder / "locked.png").chmod(0)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png")).write_bytes(saved(picture(501, 64, 64)))
    with socket.socket(socket.AF_UNIX) as unix:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket has few characters
        unix.bind("socket.png")
        os.chdir(here)
    return {
        "pipe.png",
        "loop.png",
        "loop a.png",
        "loop b.png",
        "dangling.png",
        "locked.png",
        r"\xff\xfe.png",
        "socket.png",
    }


def is_read_by_pillow(content: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Image.open(BytesIO(content)).load()
        except Exception:  # whatever its decoders raise
            return False
    return True


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, set[str]]]:
    """The folder of all files, a folder of the readable ones alone, and the names of those that are broken."""
    place = tmp_path_factory.mktemp("corpus")
    mixed, readable = place / "mixed", place / "readable"
    mixed.mkdir()
    readable.mkdir()
    flips = flipped()
    readables = good() | {name: content for name, content in flips.items() if is_read_by_pillow(content)}
    readables["bomb.png"] = png(BOMB_SIDE, BOMB_SIDE, depth=1)
    readables["coloured bomb.png"] = png(BOMB_SIDE, BOMB_SIDE, colour=6)
    broken = truncated() | bad() | {name: content for name, content in flips.items() if name not in readables}
    for folder, files in ((readable, readables), (mixed, readables | broken)):
        for name, content in files.items():
            (folder / name).write_bytes(content)
    named = special(mixed)
    (place / "far").write_bytes(saved(picture(502, 64, 64)))
    for folder in (mixed, readable):
        (folder / "points out.png").symlink_to(place / "far")
    assert len(broken) + len(named) + len(readables) > 400
    yield mixed, readable, {*broken, *named}
    shutil.rmtree(place)


def settings(folder: Path, root: Path) -> dict[str, Any]:
    data = {"images": str(folder), "patch_size": 32, "workers": 2, "max_bad_fraction": 1.0, "max_patches_per_image": 8}
    return {"name": "bad", "root": str(root), "data": data, "training": {"crop_size": 32}}


# In a process that has a child only: the peak is that of the largest of the stage's processes.
STAGE = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-c", '''
import sys
from pipelines.config import RunConfig
from pipelines.data.shards import create_shards
create_shards(RunConfig.model_validate_json(sys.argv[1]))
''', sys.argv[1]], timeout=240)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""


def check(root: Path, readable: Path, broken: set[str], tmp_path: Path) -> None:
    """All that can be read is in, as if the rest were not there, which is named with its reason."""
    found = ShardSet.open(next(path.parent for path in root.glob("shards/*/manifest.json")))
    reasons = {Path(row.path).name: row.reason for row in found.manifest.set_aside if row.status == "broken"}
    assert set(reasons) == broken
    assert all(reason and "Traceback" not in reason and len(reason) < 600 for reason in reasons.values())
    alone = create_shards(make(settings(readable, tmp_path / "alone")))
    of_alone = {Path(row.path).name for row in alone.manifest.set_aside}
    assert of_alone <= {"1x1.png", "1xN.png", "Nx1.png"}, "they are smaller than a patch"
    assert tars(found) == tars(alone)


def tars(made: ShardSet) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in made.path.glob("*.tar")}


def test_bad_images_never_take_good_ones_with_them(corpus: tuple[Path, Path, set[str]], tmp_path: Path):
    mixed, readable, broken = corpus
    config = make(settings(mixed, tmp_path / "root")).model_dump_json(by_alias=True)
    done = subprocess.run(
        [*POWERLESS, sys.executable, "-c", STAGE, config], cwd=PROJECT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    remarks = [line for line in done.stderr.splitlines() if not line.startswith("tempfile.tif: ")]  # libtiff's own
    assert remarks == [], "nothing of what the decoders remark reaches the user"
    # 11 bytes a pixel of the largest picture, a PNG, and what Python, torch and webdataset take by themselves.
    assert int(done.stdout) * 1024 < 11 * BOMB_SIDE**2 + 800e6
    check(tmp_path / "root", readable, broken, tmp_path)


@pytest.mark.parametrize("name", slow())
def test_what_would_take_too_long_is_refused_before_it_is_decoded(name: str):
    content, reason = slow()[name]
    start = time.process_time()
    with pytest.raises(ImageError, match=reason):
        open_image(content)
    assert time.process_time() - start < 5


def test_pictures_like_those_but_real_are_read():
    image = picture(600, 64, 48)
    index = saved(image, "MPO", save_all=True, append_images=[picture(601, 64, 48)])
    plain = b"P3\n# by hand\n64 48 # so large\n255\n" + " ".join(map(str, image.tobytes())).encode()
    assert Image.open(BytesIO(index)).format == "MPO"
    assert open_image(index).tobytes() == Image.open(BytesIO(saved(image, "JPEG"))).tobytes()
    assert open_image(plain).tobytes() == image.tobytes()


# The high-water mark of the process itself: that of getrusage begins with that of the process which started it.
DECODE = """
import re, sys
from pathlib import Path
from pipelines.data.pixels import read_rgb

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

content = Path(sys.argv[1]).read_bytes()
before = peak()
image = read_rgb(content, (0, 0, 0), manage_colour=True)
print((peak() - before) / (image.width * image.height))
"""


def large_ones(side: int) -> dict[str, tuple[bytes, int]]:
    """Large pictures, and how many bytes a pixel they may take.

    Pillow has 4 bytes a pixel of the picture, and as many of the result; strips come to 60 MB, which is less than 3.
    """
    colour, clear = Image.new("RGB", (side, side), "teal"), Image.new("RGBA", (side, side), "teal")
    deep = zlib.compress((b"\0" + bytes(8 * side)) * side, 1)
    return {
        "rgb.png": (saved(colour, compress_level=1), 8 + 3),
        "rgba.png": (saved(clear, compress_level=1), 8 + 3),
        "rgb.jpg": (saved(colour, "JPEG"), 8 + 3),
        "cmyk.jpg": (saved(colour.convert("CMYK"), "JPEG", progressive=True), 4 + 8 + 3),  # 16-bit coefficients
        "rgba 16 bit.png": (png(side, side, depth=16, colour=6, data=deep), 8 + 4 + 3),
        "rgba.webp": (saved(clear, "WEBP", method=0), 4 + 3 * 4 + 3),  # two canvases and the bytes of the frame
        "rgba.avif": (saved(clear, "AVIF", speed=10, subsampling="4:4:4"), 4 + 8 + 3),
    }


@pytest.mark.full
def test_the_memory_that_a_picture_takes_is_bounded_by_its_pixels(tmp_path: Path):
    taken, allowed = {}, {}
    for name, (content, most) in large_ones(5000).items():
        (tmp_path / name).write_bytes(content)
        command = [sys.executable, "-c", DECODE, str(tmp_path / name)]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
        taken[name], allowed[name] = float(done.stdout), most
    assert {name: peak for name, peak in taken.items() if not 4 < peak < allowed[name]} == {}


@pytest.mark.full
def test_the_command_gets_through_them_too(corpus: tuple[Path, Path, set[str]], tmp_path: Path):
    mixed, readable, broken = corpus
    (tmp_path / "c.json").write_text(json.dumps(settings(mixed, tmp_path / "root")))
    command = [sys.executable, "-m", "flows", "shards", "--config", str(tmp_path / "c.json")]
    done = subprocess.run(
        [*POWERLESS, *command], cwd=PROJECT, env=clean_environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    check(tmp_path / "root", readable, broken, tmp_path)


@pytest.mark.parametrize("how", ["pad", "resize"])
def test_a_line_of_pixels_is_not_blown_up_to_a_picture_that_fills_the_memory(
    how: str, photos: Path, tiny: dict[str, Any], tmp_path: Path
):
    folder = shutil.copytree(photos, tmp_path / "photos")
    length = MAX_PIXELS // 16 + 1
    (folder / "line.png").write_bytes(png(length, 1))  # 25 kB
    config = make(tiny, data={"images": str(folder), "patch_size": 16, "small_images": how, "max_bad_fraction": 1.0})
    (row,) = create_shards(config).manifest.set_aside
    would_be = 16 * length if how == "pad" else 16 * 16 * length
    assert row.status == "skipped", "for the test split it would be whole"
    assert row.reason == (
        f"its {length} x 1 pixels, brought to a patch's side ({how}), would be {would_be:,}, "
        f"and more than {MAX_PIXELS:,}"
    )
