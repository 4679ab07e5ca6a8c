"""Images to files and back, with a trained codec: `encode` and `decode` in memory, `codecmill compress` for files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.codec.picture_codec import PictureCodec

PLAIN_ALPHA = {"RGBa": "RGBA", "La": "LA", "PA": "RGBA"}
"""Modes that no file has, for alpha is multiplied in or belongs to a palette, and what they are written as."""

WRITTEN = {"PNG": ("1", "L", "LA", "P", "RGBA", "I;16", "I;16B"), "TIFF": ("I", "I;16L", "CMYK", "LAB")}
"""Modes that a file says more of than Pillow's own conversion knows, and the format that keeps them as they are."""

ORIENTATION = 0x0112
"""EXIF's tag of how a camera was held."""

BESIDE = ("icc_profile", "transparency")
"""What Pillow keeps beside the pixels that decides on their colours."""


def encode(
    image: "Image.Image",
    quality: float = 50.0,
    *,
    model: "str | PictureCodec | None" = None,
    root: str | Path = "codecmill-data",
) -> bytes:
    """The content of a `.cmill` file of a picture.

    Args:
        image: of any size and any mode but F, treated as `compress` treats it in a file: made upright as its EXIF says,
            brought to sRGB from its colour profile; transparent pixels show white.
        quality: 1 to 100.
        model: a run, a checkpoint's folder or an address in MLflow; by default the champion under the root. For many
            pictures open it once: `pipelines.codec.opening.open_codec`.

    Raises:
        InputError: there is no such model, or it is no codec; the picture or the quality is none that can be coded.
    """
    codec = _opened(model, root)
    return codec.encode(_as_rgb(image), codec.step_of(quality))


def decode(
    content: bytes,
    *,
    model: "str | PictureCodec | None" = None,
    root: str | Path = "codecmill-data",
) -> "Image.Image":
    """The picture (mode RGB) in the content of a `.cmill` file.

    Args:
        model: as of `encode`; by default the one under the root that wrote the file.

    Raises:
        InputError: the content is damaged, or no such file, or another model wrote it.
    """
    from pipelines.codec.container import parse
    from pipelines.codec.opening import codec_that_wrote
    from pipelines.run_directory import Root

    coded = parse(content, "The content")
    if model is None:
        return codec_that_wrote(coded.model, "The content", Root(Path(root).absolute())).decode(coded)
    return _opened(model, root).decode(coded)


def _opened(model: "str | PictureCodec | None", root: str | Path) -> "PictureCodec":
    from pipelines.codec.opening import open_codec
    from pipelines.run_directory import Root

    return open_codec(model, Root(Path(root).absolute())) if model is None or isinstance(model, str) else model


def _as_rgb(image: "Image.Image") -> "Image.Image":
    """The picture as the same one in a file would be read: 16 bits to 8 by round(v / 257), transparent pixels white.

    Raises:
        InputError: it has no pixels, or samples that have no defined scale, or one that no picture has.
    """
    from io import BytesIO

    from pipelines.data.images import ImageError, open_image

    if not image.width or not image.height:
        raise InputError(f"A picture of {image.width} x {image.height} pixels cannot be coded: there must be some.")
    image.load()  # Pillow turns some upright here
    orientation = _orientation(image)
    is_plain = orientation == 1 and not any(image.info.get(name) is not None for name in BESIDE)
    if image.mode == "RGB" and is_plain:
        return image
    if image.mode == "F":
        raise InputError(
            "A picture of mode F cannot be coded, for floating-point samples have no defined scale: bring them to "
            "0 to 255 and convert it to L."
        )
    image = image.convert(PLAIN_ALPHA.get(image.mode, image.mode))
    format_ = next((name for name, modes in WRITTEN.items() if image.mode in modes), None)
    if image.mode in ("RGB", "L") and "transparency" not in image.info:
        format_ = "TIFF"  # in a PNG a profile of over a megabyte is taken for an attack
    if format_ is None:  # without depth or transparency: Pillow's own way is the only one
        image, format_ = image.convert("RGB"), "PNG"
        if is_plain:
            return image
    file = BytesIO()
    fast = {"compression": "raw"} if format_ == "TIFF" else {"compress_level": 1}
    try:
        image.save(file, format=format_, **fast, **_exif(orientation))
        return open_image(file.getvalue())
    except ImageError as error:
        raise InputError(f"A picture of mode {image.mode} cannot be coded: {error}") from error


def _orientation(image: "Image.Image") -> int:
    """By the EXIF standard: 1 is upright."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data raises anything; the picture itself is fine without it
        return 1


def _exif(orientation: int) -> dict[str, Any]:
    """As `save` takes it, without all that a camera wrote beside it; nothing of an upright picture."""
    from PIL import Image

    if orientation == 1:
        return {}
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return {"exif": exif}
