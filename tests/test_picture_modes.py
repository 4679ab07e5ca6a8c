"""Pictures in memory, of whatever mode, are coded as the same pictures in files are."""

import numpy as np
import pytest
from PIL import Image, ImageCms
from test_codec import codec_of, picture

from pipelines.codec import decode, encode
from pipelines.errors import InputError


@pytest.mark.parametrize(("mode", "layout"), [("I;16", "<u2"), ("I;16L", "<u2"), ("I;16B", ">u2"), ("I", "=i4")])
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


def test_samples_in_memory_without_a_scale_are_refused():
    codec = codec_of("factorized")
    with pytest.raises(InputError, match="mode F cannot be coded, for floating-point samples have no defined scale: "):
        encode(Image.new("F", (4, 4), 0.5), model=codec)
    with pytest.raises(InputError, match=r"mode I cannot be coded: .* reach from 70000 to 70000, which is beyond 16 b"):
        encode(Image.new("I", (4, 4), 70_000), model=codec)
