"""Files of pictures to coded files and back, in a folder of the user's choice."""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL.Image import Image

from pipelines.codec.container import HEAD, SUFFIX, parse, parse_head
from pipelines.codec.opening import codec_that_wrote
from pipelines.codec.picture_codec import PictureCodec
from pipelines.codec.rate_control import bits_per_pixel, encode_to_rate
from pipelines.config import Section
from pipelines.data.images import ImageError, open_image
from pipelines.durable_files import told_where, write_bytes
from pipelines.errors import CodecmillError, InputError
from pipelines.progress import Progress, report
from pipelines.run_directory import Root


class Written(Section):
    """A file that was written.

    Attributes:
        source: what it was made of.
        bits_per_pixel: of the coded file, whole.
        remark: what the user should know; empty as a rule.
    """

    source: Path
    path: Path
    width: int
    height: int
    bits_per_pixel: float
    remark: str = ""


def compress(
    images: Sequence[Path], folder: Path, codec: PictureCodec, quality: float | None, target_bpp: float | None
) -> Iterator[Written]:
    """Write `folder/<stem>.cmill` of each image, one at a time.

    Args:
        quality: 1 to 100; None where `target_bpp`, bits per pixel of the whole file, is given.

    Raises:
        InputError: an image cannot be read, two have one stem, the quality is out of range, or the folder cannot be
            written to.
        CodecmillError: there is no room.
    """
    targets = _targets(images, folder, SUFFIX)
    step = None if quality is None else codec.step_of(quality)
    for place, (source, target) in enumerate(targets.items()):
        report(Progress("compression", place, len(targets), "images", source.name))
        try:
            image = open_image(source)
        except ImageError as error:
            raise InputError(str(error)) from error
        remark = ""
        with _named(source, "coded"):
            if step is not None:
                content = codec.encode(image, step)
                remark = "the model has one quality, whichever is asked for" if codec.has_one_quality else ""
            else:
                content, _, is_reached = encode_to_rate(codec, image, target_bpp or 0.0)
                if not is_reached:
                    rate = bits_per_pixel(content, image)
                    remark = f"{target_bpp:g} bpp is out of this model's reach: {rate:.3f} is the nearest"
        with told_where(target):
            write_bytes(target, content)
        yield _written(source, target, image, content, remark)
    report(Progress("compression", len(targets), len(targets), "images"))


def decompress(files: Sequence[Path], folder: Path, codec: PictureCodec | None, root: Root) -> Iterator[Written]:
    """Write `folder/<stem>.png` of each coded file, one at a time.

    Args:
        codec: None to look for the one that wrote a file under the root.

    Raises:
        InputError: a file is damaged or none, two have one stem, the model that wrote it is not there, or the folder
            cannot be written to.
        CodecmillError: there is no room.
    """
    targets = _targets(files, folder, ".png")
    reader = codec
    for place, (source, target) in enumerate(targets.items()):
        report(Progress("decompression", place, len(targets), "images", source.name))
        content = _read(source)
        coded = parse(content, str(source))
        if reader is None or (codec is None and reader.sha256 != coded.model):
            reader = codec_that_wrote(coded.model, str(source), root)
        with _named(source, "decoded"):
            image = reader.decode(coded)
        png = BytesIO()
        image.save(png, format="PNG")
        with told_where(target):
            write_bytes(target, png.getvalue())
        yield _written(source, target, image, content)
    report(Progress("decompression", len(targets), len(targets), "images"))


@contextmanager
def _named(source: Path, what: str) -> Iterator[None]:
    """Of several files it is to be clear which one cannot be coded or decoded."""
    try:
        yield
    except CodecmillError as error:
        raise type(error)(f"{source} cannot be {what}. {error}") from error


def _written(source: Path, target: Path, image: Image, content: bytes, remark: str = "") -> Written:
    """What is said of a picture and its coded file, whichever was made of the other."""
    return Written(
        source=source,
        path=target,
        width=image.width,
        height=image.height,
        bits_per_pixel=bits_per_pixel(content, image),
        remark=remark,
    )


def _read(file: Path) -> bytes:
    """A coded file, or what comes out of a pipe: its head, what that announces, and a byte more to find a surplus."""
    try:
        with file.open("rb") as stream:
            about = os.fstat(stream.fileno())
            head = stream.read(HEAD)
            _, rest = parse_head(head, about.st_size if stat.S_ISREG(about.st_mode) else None, str(file))
            return head + stream.read(rest + 1)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error


def _targets(sources: Sequence[Path], folder: Path, suffix: str) -> dict[Path, Path]:
    """What is written of each source.

    Raises:
        InputError: two have one name, a source would be overwritten, or there can be no such folder.
    """
    targets: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    for source in sources:
        target = folder / f"{source.stem}{suffix}"
        if target in taken and taken[target] != source:
            raise InputError(f"{taken[target]} and {source} would both become {target}: rename one.")
        if target.absolute() == source.absolute():
            raise InputError(f"{source} would be overwritten: name another folder with -o.")
        targets[source], taken[target] = target, source
    with told_where(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return targets
