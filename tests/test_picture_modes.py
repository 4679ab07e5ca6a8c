"""Pictures in memory, of whatever mode, are coded as the same pictures in files are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from test_codec import codec_of, picture
from test_images import linear_profile

from pipelines.codec import decode, encode
from pipelines.codec.files import compress
from pipelines.codec.picture_codec import PictureCodec
from pipelines.data import picture_limits
from pipelines.errors import InputError

SIXTEEN_BITS = [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I;16N", "=u2"), ("I", "=i4")]


@pytest.mark.parametrize(("mode", "layout"), SIXTEEN_BITS)
def test_sixteen_bits_in_memory_become_eight_by_rounding(mode: str, layout: str):
    codec = codec_of("factorized")
    values = np.linspace(0, 65_535, 30 * 20).astype(np.int64).reshape(20, 30)
    image = Image.frombytes(mode, (30, 20), values.astype(layout).tobytes())
    assert image.mode == mode
    grey = np.round(values / 257).astype(np.uint8)
    assert (grey != values // 256).any()
    expected = encode(Image.fromarray(np.stack([grey] * 3, axis=2)), 100, model=codec)
    assert encode(image, 100, model=codec) == expected


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_transparent_pixels_in_memory_show_white(mode: str):
    codec, image = codec_of("factorized"), picture(30, 20)
    if not mode.startswith("RGB"):
        image = image.convert("L")
    opaque = np.arange(30 * 20).reshape(20, 30) % 3 > 0
    colours = np.where(opaque[..., None], np.asarray(image.convert("RGB")), 255).astype(np.uint8)
    image = image.convert({"RGBa": "RGBA", "La": "LA"}.get(mode, mode))
    image.putalpha(Image.fromarray((opaque * 255).astype(np.uint8)))
    image = image.convert(mode)
    assert image.mode == mode
    assert encode(image, 100, model=codec) == encode(Image.fromarray(colours), 100, model=codec)


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_pictures_in_memory_of_other_modes_are_those_of_pillow(mode: str):
    codec, image = codec_of("factorized"), picture(30, 20).convert(mode)
    assert encode(image, 100, model=codec) == encode(image.convert("RGB"), 100, model=codec)


def test_lab_in_memory_is_the_colour_that_it_was_made_of():
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    image = Image.new("RGB", (8, 8), (200, 90, 40))
    lab = ImageCms.applyTransform(image, to_lab)
    assert lab is not None and lab.mode == "LAB"
    codec = codec_of("factorized")
    found, expected = (np.asarray(decode(encode(each, 100, model=codec), model=codec)) for each in (lab, image))
    assert np.abs(found.astype(int) - expected).mean() < 4


def as_a_file(folder: Path, name: str, codec: PictureCodec) -> bytes:
    (written,) = compress([folder / name], folder / "coded", codec, 100, None)
    return written.path.read_bytes()


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_photograph_in_memory_is_upright_as_its_file_is(suffix: str, mode: str, tmp_path: Path):
    """A camera that was held upright writes the picture sideways, and how it was held."""
    codec, exif = codec_of("factorized"), Image.Exif()
    packed = {"compression": "tiff_lzw"} if suffix == "tif" else {}  # Pillow 13 misreads grey TIFFs that it maps
    for orientation in (1, 3, 6):
        exif[0x0112] = orientation
        picture(30, 20).convert(mode).save(tmp_path / f"x.{suffix}", exif=exif, **packed)
        with Image.open(tmp_path / f"x.{suffix}") as image:
            content = encode(image, 100, model=codec)
        assert content == as_a_file(tmp_path, f"x.{suffix}", codec)
        assert decode(content, model=codec).size == ((20, 30) if orientation == 6 else (30, 20))


def test_a_picture_in_memory_keeps_the_colours_of_its_profile(tmp_path: Path):
    codec = codec_of("factorized")
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # not for RGB: ignored in both ways
    for number, profile in enumerate((linear_profile(), lab, b"none")):
        picture(30, 20).save(tmp_path / f"{number}.png", icc_profile=profile)
        with Image.open(tmp_path / f"{number}.png") as image:
            assert image.info["icc_profile"] == profile
            content = encode(image, 100, model=codec)
        assert content == as_a_file(tmp_path, f"{number}.png", codec)
        assert (content != encode(picture(30, 20), 100, model=codec)) == (number == 0)


def test_a_picture_in_memory_may_have_a_large_profile(tmp_path: Path):
    """Printers' are of some megabytes; Pillow takes those of a PNG for an attack."""
    codec, profile = codec_of("factorized"), linear_profile(padding=2**21)
    picture(30, 20).save(tmp_path / "x.jpg", icc_profile=profile, quality=100)
    with Image.open(tmp_path / "x.jpg") as image:
        content = encode(image, 100, model=codec)
    assert content == as_a_file(tmp_path, "x.jpg", codec)


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (0, 0, 0)), ("L", 0), ("P", 3)])
def test_a_colour_that_counts_as_transparent_shows_white_in_memory(mode: str, colour: Any, tmp_path: Path):
    codec, image = codec_of("factorized"), picture(30, 20).convert(mode)
    image.paste(colour, (5, 5, 20, 15))
    image.save(tmp_path / "x.png", transparency=colour)
    with Image.open(tmp_path / "x.png") as image:
        content = encode(image, 100, model=codec)
    assert content == as_a_file(tmp_path, "x.png", codec)
    decoded = np.asarray(decode(content, model=codec))
    assert (decoded[8:12, 8:17] > 200).all()


@pytest.mark.parametrize("beside", [{"transparency": None}, {"icc_profile": "sRGB"}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_is_said_beside_a_picture_in_memory_and_is_none_leaves_it_as_it_is(mode: str, beside: dict[str, Any]):
    codec, image = codec_of("factorized"), picture(30, 20).convert(mode)
    plain = encode(image, 100, model=codec)
    image.info |= beside
    assert encode(image, 100, model=codec) == plain
    assert image.info == beside


def test_damaged_exif_in_memory_leaves_the_picture_as_it_is():
    codec, image = codec_of("factorized"), picture(30, 20)
    image.info["exif"] = b"Exif\0\0II*\0garbage that is no directory"
    assert encode(image, 100, model=codec) == encode(picture(30, 20), 100, model=codec)


@pytest.mark.parametrize("orientation", ["6", b"\x06", (6, 6), -6, 70_000])
def test_an_orientation_that_is_none_leaves_the_picture_as_it_is(orientation: Any):
    """EXIF data says of each value which type it has, and a camera may say what it likes."""
    codec, image = codec_of("factorized"), picture(30, 20)
    image.getexif()[0x0112] = orientation
    assert encode(image, 100, model=codec) == encode(picture(30, 20), 100, model=codec)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "CMYK"])
def test_a_picture_in_memory_without_pixels_is_refused(mode: str, size: tuple[int, int]):
    with pytest.raises(
        InputError, match=rf"A picture of {size[0]} x {size[1]} pixels cannot be coded: there must be s"
    ):
        encode(Image.new(mode, size), model=codec_of("factorized"))


def test_a_picture_in_memory_that_is_too_large_is_refused_before_it_is_converted(monkeypatch: pytest.MonkeyPatch):
    """Its pixels are many, not its bytes: a bitmap that is made of them would not fit this test."""
    monkeypatch.setattr(picture_limits, "MAX_PIXELS", 599)
    for mode in ("RGB", "CMYK"):
        with pytest.raises(InputError, match=f"mode {mode} cannot be coded: its 30 x 20 pixels are more than 599"):
            encode(Image.new(mode, (30, 20)), model=codec_of("factorized"))


def test_samples_in_memory_without_a_scale_are_refused():
    codec = codec_of("factorized")
    with pytest.raises(InputError, match="mode F cannot be coded, for floating-point samples have no defined scale: "):
        encode(Image.new("F", (4, 4), 0.5), model=codec)
    with pytest.raises(InputError, match=r"mode I cannot be coded: .* reach from 70000 to 70000, which is beyond 16 b"):
        encode(Image.new("I", (4, 4), 70_000), model=codec)


def test_a_picture_in_memory_that_cannot_be_read_is_refused(tmp_path: Path):
    picture(300, 200).save(tmp_path / "x.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:2000])
    strange = picture(30, 20)
    strange.info["transparency"] = b"of a palette"
    with Image.open(tmp_path / "cut.jpg") as cut:
        for image, reason in ((cut, "image file is truncated"), (strange, "argument 2 must be ")):
            with pytest.raises(InputError, match=f"A picture of mode RGB cannot be coded: {reason}"):
                encode(image, model=codec_of("factorized"))
