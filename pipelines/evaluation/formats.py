"""The formats beside which a codec is shown, as Pillow writes and reads them."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

from PIL import Image, ImageFile

MOST_JPEG_BYTES = 4
"""A pixel of a JPEG, an optimised one of colours at half the resolution: noise of 0 and 255 takes 1.6 at the finest."""

_buffer_lock = Lock()
"""Pillow's buffer is one for all threads."""

Coder = Callable[[Image.Image, float], bytes]


@dataclass(frozen=True)
class Format:
    """A format beside which a codec is shown.

    Attributes:
        settings: of its curve, coarsest first.
        write: how Pillow writes it, with a setting.
        reach: the coarsest setting that it has, and the finest.
    """

    name: str
    settings: tuple[float, ...]
    write: Coder
    reach: tuple[float, float] = (1, 100)


def _pillow(name: str, **options: Any) -> Coder:
    def write(image: Image.Image, quality: float) -> bytes:
        file = io.BytesIO()
        with _room_for(image):
            image.save(file, format=name, quality=int(quality), **options)
        return file.getvalue()

    return write


@contextmanager
def _room_for(image: Image.Image) -> Iterator[None]:
    """Have Pillow take a buffer that any JPEG of the picture fits into: it must hold an optimised one as a whole.

    Pillow guesses a byte a pixel at most; saturated noise takes more, and failed.
    """
    with _buffer_lock:
        former = ImageFile.MAXBLOCK
        ImageFile.MAXBLOCK = max(former, MOST_JPEG_BYTES * image.width * image.height)
        try:
            yield
        finally:
            ImageFile.MAXBLOCK = former


def _jpeg_2000(image: Image.Image, ratio: float) -> bytes:
    file = io.BytesIO()
    image.save(file, format="JPEG2000", quality_mode="rates", quality_layers=[ratio], irreversible=True)
    return file.getvalue()


JPEG = "JPEG"
FORMATS = (
    Format(JPEG, (5, 10, 20, 30, 45, 60, 75, 85, 92), _pillow("JPEG", optimize=True, progressive=True, subsampling=2)),
    Format("WebP", (1, 5, 15, 30, 50, 70, 80, 88, 94), _pillow("WEBP", method=6)),
    Format("AVIF", (15, 25, 35, 45, 55, 65, 75, 83, 90), _pillow("AVIF", speed=6)),
    Format("JPEG 2000", (300, 200, 120, 80, 50, 32, 22, 15, 10), _jpeg_2000, (400, 2)),
)


def read_format(content: bytes) -> Image.Image:
    """The picture (mode RGB) in a file of one of the formats."""
    return Image.open(io.BytesIO(content)).convert("RGB")
