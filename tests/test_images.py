"""Every kind of picture against its closed form, and damaged ones against their message."""

import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, PngImagePlugin
from torchvision.transforms import functional as F

from pipelines.config import NormalizationChoice
from pipelines.data import pixels
from pipelines.data.images import (
    HALF,
    IMAGENET,
    ImageError,
    Normalization,
    decode_png,
    open_image,
    open_mask,
    to_image,
    to_levels,
    to_tensor,
    to_unit,
)
from pipelines.data.png_writing import write_png
from pipelines.errors import CodecmillError

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1)
ALPHA = np.roll(RAMP, 5, axis=1)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def opened(content: bytes | Path, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    image = open_image(content, background)
    assert image.mode == "RGB"
    assert not image.info, "nothing beside the pixels is left to be written into a patch"
    return np.asarray(image)


def png16(values: np.ndarray, colour_type: int, extra: bytes = b"", interlaced: bool = False) -> bytes:
    """A 16-bit PNG as its specification has it; Pillow writes none in colour."""
    height, width = values.shape[:2]
    passes = (
        [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
        if interlaced
        else [(0, 0, 1, 1)]
    )
    rows = b"".join(
        b"\0" + row.astype(">u2").tobytes()
        for x, y, step_x, step_y in passes
        for row in values[y::step_y, x::step_x]
        if row.size
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, interlaced)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra
    return start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def chunk16(kind: bytes, *values: int) -> bytes:
    data = struct.pack(f">{len(values)}H", *values)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def rounded(values: np.ndarray) -> np.ndarray:
    """round(v / 257) in floating point, which is what the contract says."""
    return np.rint(values.astype(np.float64) / 257).astype(np.uint8)


DEEP = (np.arange(32 * 32 * 4, dtype=np.uint32) * 40503 % 65536).astype(np.uint16).reshape(32, 32, 4)


def test_grey_becomes_three_equal_channels():
    assert np.array_equal(opened(saved(Image.fromarray(RAMP))), np.stack([RAMP] * 3, axis=-1))


def test_black_and_white_become_0_and_255():
    bits = RAMP % 3 == 0
    assert np.array_equal(opened(saved(Image.fromarray(bits)))[..., 1], np.where(bits, 255, 0))


def test_alpha_shows_the_background_in_exact_proportion():
    background = (255, 10, 77)
    content = saved(Image.fromarray(np.dstack([COLOURS, ALPHA])))
    share = ALPHA[..., None] / 255
    expected = np.rint(COLOURS * share + np.array(background) * (1 - share))
    assert np.array_equal(opened(content, background=background), expected)


def test_grey_with_alpha():
    content = saved(Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(ALPHA)]))
    expected = np.rint(RAMP * (ALPHA / 255) + 255 * (1 - ALPHA / 255))
    assert np.array_equal(opened(content)[..., 2], expected)


def test_a_palette_gives_its_colours_and_its_transparency():
    image = Image.fromarray(RAMP % 4).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 200, 210, 220])
    palette = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90], [200, 210, 220]])
    assert np.array_equal(opened(saved(image)), palette[RAMP % 4])
    see_through = saved(image, transparency=bytes([255, 0, 51, 255]))
    palette[1] = (1, 2, 3)
    palette[2] = np.rint(palette[2] * 0.2 + np.array([1, 2, 3]) * 0.8)
    assert np.array_equal(opened(see_through, background=(1, 2, 3)), palette[RAMP % 4])


def test_one_transparent_colour_of_an_rgb_picture():
    content = saved(Image.fromarray(COLOURS), transparency=tuple(int(v) for v in COLOURS[3, 4]))
    expected = COLOURS.copy()
    expected[3, 4] = (9, 8, 7)
    assert np.array_equal(opened(content, background=(9, 8, 7)), expected)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_v_over_257_rounded(kind: str):
    values = DEEP[..., 0].copy()
    assert np.array_equal(opened(saved(Image.fromarray(values), kind))[..., 0], rounded(values))


def test_16_bit_grey_in_pillows_32_bit_mode():
    values = DEEP[..., 0].astype(np.int32)
    content = saved(Image.fromarray(values), "TIFF")
    assert Image.open(BytesIO(content)).mode == "I"
    assert np.array_equal(opened(content)[..., 0], rounded(values))


def test_integers_beyond_16_bits_are_refused():
    content = saved(Image.fromarray(np.full((4, 4), 65536, dtype=np.int32)), "TIFF")
    with pytest.raises(ImageError, match="its integer samples reach from 65536 to 65536, which is beyond 16 bits"):
        open_image(content)


def test_floating_point_is_refused():
    with pytest.raises(ImageError, match="floating-point samples have no defined scale"):
        open_image(saved(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize("interlaced", [False, True])
def test_16_bit_colour_keeps_its_precision_until_it_is_rounded(interlaced: bool):
    values = DEEP[..., :3]
    assert np.array_equal(opened(png16(values, 2, interlaced=interlaced)), rounded(values))


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("storage", [{}, {"compression": "zlib"}, {"tile": (16, 16)}, {"rowsperstrip": 5}])
def test_16_bit_colour_in_tiff(byteorder: Any, storage: dict[str, Any]):
    file = BytesIO()
    tifffile.imwrite(file, DEEP[..., :3], photometric="rgb", byteorder=byteorder, **storage)
    assert np.array_equal(opened(file.getvalue()), rounded(DEEP[..., :3]))


def test_16_bit_planes_that_pillow_misreads_are_refused():
    file = BytesIO()
    tifffile.imwrite(file, np.moveaxis(DEEP[..., :3], -1, 0), photometric="rgb", planarconfig="separate")
    with pytest.raises(ImageError, match="16-bit colours lie in separate planes, which Pillow misreads"):
        open_image(file.getvalue())


def test_16_bit_colour_with_alpha():
    colours, share = rounded(DEEP[..., :3]), rounded(DEEP[..., 3:]) / 255
    expected = np.rint(colours * share + 255 * (1 - share))
    assert np.array_equal(opened(png16(DEEP, 6)), expected)


def test_16_bit_grey_with_alpha():
    values = DEEP[..., :2]
    grey, share = rounded(values[..., 0]), rounded(values[..., 1]) / 255
    assert np.array_equal(opened(png16(values, 4))[..., 0], np.rint(grey * share + 255 * (1 - share)))


def test_the_one_transparent_colour_of_16_bit_pictures():
    red, green, blue, _ = (int(v) for v in DEEP[5, 6])
    colour = opened(png16(DEEP[..., :3], 2, chunk16(b"tRNS", red, green, blue)), background=(1, 2, 3))
    assert tuple(colour[5, 6]) == (1, 2, 3)
    grey = opened(png16(DEEP[..., :1], 0, chunk16(b"tRNS", red)), background=(1, 2, 3))
    assert tuple(grey[5, 6]) == (1, 2, 3)
    elsewhere = DEEP[..., 0] != red
    assert np.array_equal(grey[elsewhere][:, 0], rounded(DEEP[..., 0])[elsewhere])


def test_cmyk_without_a_profile():
    inks = np.dstack([COLOURS, ALPHA])
    expected = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    found = opened(saved(Image.frombytes("CMYK", (16, 16), inks.tobytes()), "TIFF"))
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_orientation_is_undone(orientation: int, kind: str):
    upright = COLOURS[:12]
    # How the camera stored what its owner saw upright: the definition of each value in the EXIF standard.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    content = saved(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    assert np.array_equal(opened(content), upright)


def test_16_bit_pictures_are_turned_upright_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = saved(Image.fromarray(DEEP[:10, :, 0].copy()), "PNG", exif=exif)
    assert np.array_equal(opened(content)[..., 0], rounded(DEEP[:10, :, 0])[::-1].T)


def linear_profile(grey: bool = False, padding: int = 0) -> bytes:
    """An ICC v2 profile without gamma, built from the specification: of grey, or with sRGB's primaries."""

    def s15(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))

    # sRGB's primaries adapted to D50, as in the sRGB profile of the ICC.
    xyz = {
        b"rXYZ": (0.43607, 0.22249, 0.01392),
        b"gXYZ": (0.38515, 0.71687, 0.09708),
        b"bXYZ": (0.14307, 0.06061, 0.71410),
        b"wtpt": (0.96420, 1.0, 0.82491),
    }
    tags = {name: b"XYZ \0\0\0\0" + s15(*values) for name, values in xyz.items() if name == b"wtpt" or not grey}
    tags |= dict.fromkeys((b"kTRC",) if grey else (b"rTRC", b"gTRC", b"bTRC"), b"curv" + bytes(8))
    tags[b"none"] = b"data" + bytes(8 + padding)
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 7) + b"linear\0" + bytes(78 + 5)
    tags[b"cprt"] = b"text\0\0\0\0none\0\0\0\0"
    table, data, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", offset + len(data), len(content))
        data += content
    size = offset + len(data)
    header = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02400000, b"mntr", b"GRAY" if grey else b"RGB ", b"XYZ ")
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + s15(0.96420, 1.0, 0.82491) + bytes(48)
    return header + table + data


def srgb_encoded(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_an_embedded_profile_is_followed_to_srgb():
    found = opened(saved(Image.fromarray(COLOURS), icc_profile=linear_profile()))
    assert np.abs(found - 255 * srgb_encoded(COLOURS / 255)).max() <= 2
    assert np.abs(found.astype(int) - COLOURS).max() > 50


@pytest.mark.parametrize("kind", ["L", "LA", "L with a transparent colour"])
def test_a_profile_of_grey_is_followed_also_beside_transparency(kind: str):
    grey = Image.fromarray(RAMP)
    clear: dict[str, Any] = {"transparency": 3} if kind.startswith("L with") else {}
    image = grey if kind != "LA" else Image.merge("LA", (grey, Image.new("L", grey.size, 255)))
    found = opened(saved(image, icc_profile=linear_profile(grey=True), **clear))
    is_light = RAMP > 32  # littleCMS takes grey through L*, which is a line near black
    assert np.abs(found[..., 0] - 255 * srgb_encoded(RAMP / 255))[is_light].max() <= 2


def test_pixels_with_an_srgb_profile_stay_as_they_are():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found = opened(saved(Image.fromarray(COLOURS), icc_profile=profile))
    assert np.abs(found.astype(int) - COLOURS).max() <= 1


@pytest.mark.parametrize("profile", [b"no profile at all", linear_profile()[:200]])
def test_a_broken_profile_is_ignored_and_noted(profile: bytes):
    notes: list[str] = []
    found = open_image(saved(Image.fromarray(COLOURS), icc_profile=profile), notes=notes)
    assert np.array_equal(np.asarray(found), COLOURS)
    (note,) = notes
    assert note.startswith("its colour profile was ignored: ")


def test_a_profile_of_another_colour_space_is_ignored():
    grey = Image.fromarray(RAMP)
    assert np.array_equal(opened(saved(grey, icc_profile=linear_profile()))[..., 0], RAMP)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str):
    first, second = Image.new("RGB", (20, 10), (250, 10, 10)), Image.new("RGB", (20, 10), (10, 10, 250))
    options = {"lossless": True} if kind == "WEBP" else {}
    content = saved(first, kind, save_all=True, append_images=[second], **options)
    assert np.array_equal(opened(content), np.asarray(first))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "BMP", "TIFF", "PPM"])
def test_formats_that_pillow_reads_by_itself(kind: str):
    content = saved(Image.fromarray(COLOURS), kind)
    assert np.array_equal(opened(content), np.asarray(Image.open(BytesIO(content)).convert("RGB")))
    assert type(open_image(content)) is Image.Image, "not the file, whose decoder has canvases of its own"


def test_masks_keep_their_values_under_any_profile_and_are_black_where_transparent():
    assert open_mask(saved(Image.fromarray(RAMP))).tobytes() == RAMP.tobytes()
    coloured = np.stack([RAMP] * 3, axis=-1)
    managed = saved(Image.fromarray(coloured), icc_profile=linear_profile())
    assert open_mask(managed).tobytes() == RAMP.tobytes()
    half = Image.merge("LA", [Image.new("L", (4, 4), 255), Image.new("L", (4, 4), 0)])
    assert np.asarray(open_mask(saved(half))).max() == 0


def test_broken_files_are_named_with_their_reason(tmp_path: Path):
    good = saved(Image.effect_noise((64, 64), 50))
    cases = {
        "empty.png": (b"", "it is empty"),
        "text.png": (b"not a picture", "its content is of no known image format"),
        "cut.png": (good[: len(good) // 2], "truncated|broken"),
        "cut.jpg": (saved(Image.effect_noise((64, 64), 50), "JPEG")[:700], "truncated"),
        "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known image format"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=rf"{name} cannot be read as an image: .*({reason})"):
            open_image(tmp_path / name)
    with pytest.raises(ImageError, match=r"absent\.png cannot be read as an image: .*No such file"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="A picture of 13 bytes cannot be read"):
        open_image(b"not a picture")


@pytest.mark.filterwarnings("default")
def test_a_picture_that_claims_to_be_huge_is_refused_before_it_is_decoded():
    content = bytearray(saved(Image.new("L", (8, 8))))
    content[16:24] = struct.pack(">II", 30_000, 20_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ImageError, match="more than 400,000,000"):
        open_image(bytes(content))
    assert not caught


def test_a_large_photograph_is_no_bomb_and_brings_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(saved(Image.new("L", (12_000, 8_000)))).size == (12_000, 8_000)


def test_what_pillow_remarks_on_odd_files_does_not_reach_the_user():
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert np.array_equal(opened(saved(Image.fromarray(COLOURS), exif=exif)), COLOURS)
        before = list(warnings.filters)
        with pixels.silence(), pixels.silence():
            warnings.warn("unheard", stacklevel=1)
        assert warnings.filters == before
    assert not caught


def test_png_keeps_the_pixels_and_nothing_else():
    image = Image.fromarray(COLOURS)
    image.info["icc_profile"] = b"x"
    content = write_png(open_image(saved(image, pnginfo=PngImagePlugin.PngInfo())))
    assert np.array_equal(np.asarray(decode_png(content)), COLOURS)
    kinds = {content[i + 4 : i + 8] for i in range(8, len(content) - 8) if content[i + 4 : i + 8].isalpha()}
    assert b"iCCP" not in kinds
    assert b"tEXt" not in kinds


def test_tensors_and_pictures_turn_into_each_other():
    image = Image.fromarray(COLOURS)
    tensor = to_tensor(image)
    assert tensor.shape == (3, 16, 16)
    assert torch.equal(to_unit(tensor, torch.float32), F.to_tensor(image))
    assert np.array_equal(np.asarray(to_image(tensor)), COLOURS)
    every = torch.arange(256, dtype=torch.uint8)
    assert all(torch.equal(to_levels(to_unit(every, dtype)), every) for dtype in (torch.float32, torch.float64))
    odd = torch.tensor([-1.0, 0.5 / 255, 1.5 / 255, 2.0], dtype=torch.float64)
    assert to_levels(odd).tolist() == [0, 0, 2, 255], "clamped, and halves go to the even level"


@pytest.mark.parametrize("normalization", [IMAGENET, HALF, Normalization((0.1, 0.2, 0.3), (0.01, 2.0, 0.5))])
def test_normalising_is_torchvisions_and_denormalising_undoes_it(normalization: Normalization):
    x = torch.rand(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = normalization.normalize(x)
    torch.testing.assert_close(y, F.normalize(x, list(normalization.mean), list(normalization.std)), rtol=0, atol=1e-14)
    torch.testing.assert_close(normalization.denormalize(y), x, rtol=0, atol=1e-14)
    assert normalization.normalize_(x) is x
    assert torch.equal(x, y)


def test_the_normalisation_in_use_is_the_chosen_one():
    measured = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    own = NormalizationChoice(mean=(0.5, 0.4, 0.3), std=(0.2, 0.1, 0.3))
    assert Normalization.resolve("dataset", measured) is measured
    assert Normalization.resolve("half", measured).mean == (0.5, 0.5, 0.5)
    assert Normalization.resolve("imagenet", measured).std == (0.229, 0.224, 0.225)
    assert Normalization.resolve(own, measured) == Normalization((0.5, 0.4, 0.3), (0.2, 0.1, 0.3))
    with pytest.raises(CodecmillError, match="standard deviations above 0"):
        Normalization((0, 0, 0), (1, 0, 1))
