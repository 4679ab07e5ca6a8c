"""Images to files and back, with a trained codec: `encode` and `decode` in memory, `codecmill compress` for files."""

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from pipelines.codec.picture_codec import PictureCodec


def encode(
    image: "Image.Image",
    quality: float = 50.0,
    *,
    model: "str | PictureCodec | None" = None,
    root: str | Path = "codecmill-data",
) -> bytes:
    """The content of a `.cmill` file of a picture.

    Args:
        image: of any mode but F, treated as `compress` treats it in a file: made upright as its EXIF says, brought to
            sRGB from its colour profile; transparent pixels show white.
        quality: 1 to 100.
        model: a run, a checkpoint's folder or an address in MLflow; by default the champion under the root, or the
            newest finished codec where that is none. For many pictures open it once:
            `pipelines.codec.opening.open_codec`.

    Raises:
        InputError: there is no such model, or it is no codec; the picture or the quality is none that can be coded.
        CodecmillError: the model is damaged, its training has diverged, or it makes more bytes than a file may have.
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
        model: as of `encode`; by default the one that wrote the file, under the root or in its MLflow.

    Raises:
        InputError: the content is damaged, or no such file, or another model wrote it.
        CodecmillError: it is none of this model, though its checksums fit; or the model is damaged.
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
        InputError: it has no pixels or too many, or samples that have no defined scale, or one that no picture has.
    """
    from pipelines.data.images import WHITE
    from pipelines.data.pixels import upright_rgb

    if not image.width or not image.height:
        raise InputError(f"A picture of {image.width} x {image.height} pixels cannot be coded: there must be some.")
    if image.mode == "F":
        raise InputError(
            "A picture of mode F cannot be coded, for floating-point samples have no defined scale: bring them to "
            "0 to 255 and convert it to L."
        )
    try:
        return upright_rgb(image, WHITE)
    except MemoryError:
        raise
    except Exception as error:  # as in `open_image`: damaged bytes, or what Pillow was told beside them
        reason = str(error).rstrip(".") or type(error).__name__
        raise InputError(f"A picture of mode {image.mode} cannot be coded: {reason}.") from error
