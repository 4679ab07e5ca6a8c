"""How any picture that Pillow reads becomes upright 8-bit RGB: depth, palette, alpha, colour profile, orientation."""

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import cast

import numpy as np
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin

from pipelines.data.picture_limits import check_beside, check_size, check_work
from pipelines.data.plain_png import decode_plain_png

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "AVIF", "GIF", "PPM")
"""Pillow's readers that are used. Others are left out: EPS, for one, starts Ghostscript."""

STRIP_PIXELS = 2**20
"""Rows are converted in strips of about so many pixels, so that what is needed on the way stays small."""

_ORIENTATION_TAG = 0x0112
_BITS_TAG = 258
_PLANES_TAG = 284
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FOREIGN = "16B" if sys.byteorder == "little" else "16L"
_OTHER_BYTE = {
    f"{mode};{order}": f"{mode};{other}"
    for mode in ("RGB", "RGBA")
    for order, other in (("16B", "16L"), ("16L", "16B"), ("16N", _FOREIGN))
}
"""Pillow's names of 16-bit layouts, and the one under which it takes the byte of each sample that it would drop."""


def read_rgb(
    content: bytes, background: tuple[int, int, int], manage_colour: bool, notes: list[str] | None = None
) -> Image.Image:
    """Decode the first frame of `content` to upright RGB (or raise whatever Pillow raises on it).

    Alpha is laid over `background`. 16-bit samples v become round(v / 257). With `manage_colour` an embedded profile
    is followed to sRGB; one that cannot be read is ignored, and `notes` says so. CMYK without a profile is
    (255 - C)(255 - K) / 255.

    Raises:
        ValueError: beyond `picture_limits`, or samples without a defined scale.
    """
    with silence():
        image = _open(content)
        plain = decode_plain_png(content) if image.format == "PNG" else None
        if plain is not None:
            return Image.fromarray(plain)
        deep = _deep_rawmode(image)
        image.load()
        orientation = _orientation(image)
        to_srgb = _ToSrgb(image.info.get("icc_profile") if manage_colour else None, notes)
        low = _low_bytes(content, deep) if deep else None
        rgb = _converted(image, low, deep, to_srgb, background)
        del image, low
        rgb = _upright(rgb, orientation)
    # What Pillow found beside the pixels (profile, transparency) would otherwise be written into every patch.
    rgb.info.clear()
    return rgb


def upright_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A picture in memory as `read_rgb` reads it in a file (or raise whatever Pillow raises on it).

    Raises:
        ValueError: as of `read_rgb`.
    """
    with silence():
        check_size(image)
        image.load()  # Pillow turns some upright here
        orientation = _orientation(image)
        if image.mode in ("RGBa", "La"):  # alpha is multiplied in, which no file has
            image = image.convert(image.mode.upper())
        if image.info.get("transparency", 0) is None:  # of which Pillow makes an alpha channel, or cannot
            image = image.copy()
            del image.info["transparency"]
        profile = image.info.get("icc_profile")
        to_srgb = _ToSrgb(profile if isinstance(profile, bytes) else None, None)
        return _upright(_converted(image, None, None, to_srgb, background), orientation)


def _upright(rgb: Image.Image, orientation: int) -> Image.Image:
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _converted(
    image: Image.Image,
    low: Image.Image | None,
    deep: str | None,
    to_srgb: "_ToSrgb",
    background: tuple[int, int, int],
) -> Image.Image:
    """A decoded picture as RGB, not yet upright, strip by strip; if it is that, the same pixels without a copy."""
    if image.mode == "RGB" and not (to_srgb.profile or low or image.has_transparency_data):
        return image._new(image.im)  # not the file: those of WebP and AVIF keep what they decoded into as well
    rows = max(1, STRIP_PIXELS // image.width)
    if rows >= image.height:
        return _strip(image, low, deep, to_srgb, background)
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        rgb.paste(_strip(image.crop(box), low.crop(box) if low else None, deep, to_srgb, background), box)
    return rgb


def _strip(
    image: Image.Image,
    low: Image.Image | None,
    deep: str | None,
    to_srgb: "_ToSrgb",
    background: tuple[int, int, int],
) -> Image.Image:
    """Some rows of a picture as RGB, not yet upright."""
    if low is not None:
        colours, alpha = _reduced_colour(image, low, deep)
    elif image.mode.startswith("I"):
        colours, alpha = _reduced_grey(image)
    else:
        colours, alpha = _eight_bit(image)
    rgb = to_srgb(colours)
    return Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha) if alpha is not None else rgb


def _open(content: bytes) -> ImageFile.ImageFile:
    check_beside(content)
    image = Image.open(BytesIO(content), formats=FORMATS)
    check_size(image)
    check_work(image, content)
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF data raises anything; the picture itself is fine without it
        return 1


def _eight_bit(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours in a mode that a profile may describe (L, RGB, CMYK, LAB), and the alpha channel if there is one."""
    if image.mode == "F":
        raise ValueError("its floating-point samples have no defined scale")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        is_grey = image.mode in ("1", "L", "LA")  # as its profile is
        colours = with_alpha.getchannel("R") if is_grey else with_alpha.convert("RGB")
        return colours, with_alpha.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _reduced_grey(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """8-bit grey from 16-bit grey, in whichever of Pillow's integer modes it comes."""
    values = np.asarray(image)
    lowest, highest = values.min(), values.max()
    if lowest < 0 or highest > 65535:
        raise ValueError(f"its integer samples reach from {lowest} to {highest}, which is beyond 16 bits")
    transparent = image.info.get("transparency")
    alpha = (
        Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)) if transparent is not None else None
    )
    return Image.fromarray(_reduce(values)), alpha


def _reduce(values: np.ndarray) -> np.ndarray:
    """round(v / 257) of 0 ... 65535, as uint8; there are no ties, for 257 is odd."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _deep_rawmode(image: ImageFile.ImageFile) -> str | None:
    """How a 16-bit colour picture is stored, where Pillow would keep only the high byte of each sample.

    Raises:
        ValueError: it is stored in a way that Pillow reads wrongly.
    """
    if not image.tile or image.format not in ("PNG", "TIFF"):
        return None
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits, planes = image.tag_v2.get(_BITS_TAG, ()), image.tag_v2.get(_PLANES_TAG)
        if 16 in bits and len(bits) > 1 and planes == 2:
            raise ValueError("its 16-bit colours lie in separate planes, which Pillow misreads")
    arguments = image.tile[0].args
    rawmode = arguments if isinstance(arguments, str) else arguments[0] if isinstance(arguments, tuple) else None
    return rawmode if rawmode in _OTHER_BYTE or rawmode == "LA;16B" else None


def _low_bytes(content: bytes, rawmode: str) -> Image.Image:
    """What Pillow leaves out of a 16-bit colour picture, or all of it.

    Pillow has no 16-bit colour mode and keeps each sample's high byte. Told the other byte order it keeps the low one,
    and the two make the whole sample; a 16-bit grey-alpha pixel fills the four bytes of an RGBA pixel by itself.
    """
    return _reread(content, "RGBA" if rawmode == "LA;16B" else _OTHER_BYTE[rawmode])


def _reduced_colour(image: Image.Image, low: Image.Image, deep: str | None) -> tuple[Image.Image, Image.Image | None]:
    """8-bit colours and alpha from 16-bit ones: `image` has the high bytes, `low` is of `_low_bytes`."""
    if deep == "LA;16B":
        halves = np.asarray(low).astype(np.uint16)
        values = halves[..., 0::2] * 256 + halves[..., 1::2]
    else:
        values = np.asarray(image).astype(np.uint16) * 256 + np.asarray(low)
    reduced = _reduce(values)
    if values.shape[-1] in (2, 4):
        colours, alpha = reduced[..., :-1], Image.fromarray(np.ascontiguousarray(reduced[..., -1]))
    else:
        colours, alpha = reduced, None
    transparent = image.info.get("transparency")
    if alpha is None and transparent is not None:
        alpha = Image.fromarray(np.where((values == transparent).all(axis=-1), 0, 255).astype(np.uint8))
    return Image.fromarray(np.ascontiguousarray(colours.squeeze(-1) if colours.shape[-1] == 1 else colours)), alpha


def _reread(content: bytes, rawmode: str) -> Image.Image:
    image = _open(content)
    image.tile = [
        tile._replace(args=rawmode if isinstance(tile.args, str) else (rawmode, *cast("tuple", tile.args)[1:]))
        for tile in image.tile
    ]
    image.load()
    return image


class _ToSrgb:
    """Follows a picture's colour profile, if it has one that can be read; the way is found out at its first strip."""

    def __init__(self, profile: bytes | None, notes: list[str] | None):
        self.profile = profile
        self._notes = notes
        self._transform: ImageCms.ImageCmsTransform | None = None

    def __call__(self, colours: Image.Image) -> Image.Image:
        if self._transform is None and (self.profile or colours.mode == "LAB"):
            self._transform = self._found(colours.mode)
        if self._transform is None:
            return colours.convert("RGB")
        return cast("Image.Image", ImageCms.applyTransform(colours, self._transform))

    def _found(self, mode: str) -> ImageCms.ImageCmsTransform | None:
        srgb = ImageCms.createProfile("sRGB")
        if mode == "LAB":
            return ImageCms.buildTransform(ImageCms.createProfile("LAB"), srgb, mode, "RGB")
        profile, self.profile = self.profile or b"", None
        try:
            return ImageCms.buildTransform(ImageCms.ImageCmsProfile(BytesIO(profile)), srgb, mode, "RGB")
        except (ImageCms.PyCMSError, OSError, ValueError) as error:  # broken, or of another colour space
            if self._notes is not None:
                self._notes.append(f"its colour profile was ignored: {str(error).rstrip('.') or type(error).__name__}")
            return None


_silence_lock = threading.Lock()
_silent: list[warnings.catch_warnings] = []
_depth = 0


@contextmanager
def silence() -> Iterator[None]:
    """Keep Pillow's remarks on odd files from the user, who is told what became of each file anyway.

    `warnings.catch_warnings` alone is not for threads: the first to enter puts it up, the last to leave takes it down.
    """
    global _depth
    with _silence_lock:
        if _depth == 0:
            _silent.append(warnings.catch_warnings())
            _silent[0].__enter__()
            warnings.simplefilter("ignore")
        _depth += 1
    try:
        yield
    finally:
        with _silence_lock:
            _depth -= 1
            if _depth == 0:
                _silent.pop().__exit__(None, None, None)
