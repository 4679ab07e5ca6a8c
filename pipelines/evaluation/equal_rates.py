"""The same piece of a picture in every format, at the rate that the codec takes: where the codec errs most."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.codec.container import parse
from pipelines.codec.picture_codec import PictureCodec
from pipelines.codec.rate_control import bits_per_pixel
from pipelines.evaluation.metrics import psnr
from pipelines.evaluation.rate_distortion import FORMATS, OURS, read_format

SIDE = 192
"""Of a piece, in pixels; smaller pictures are shown whole."""

ROUNDS = 10
"""Of bisection between a format's coarsest and its finest setting."""


@dataclass(frozen=True)
class Piece:
    """A piece of a decoded picture; its rate and PSNR are those of the whole picture."""

    codec: str
    bits_per_pixel: float
    psnr: float
    picture: Image.Image


@dataclass(frozen=True)
class Pieces:
    """The same piece of one picture: of the original, and of each format at about the same rate, the codec's first."""

    name: str
    original: Image.Image
    decoded: tuple[Piece, ...]


def at_equal_rates(codec: PictureCodec, name: str, image: Image.Image) -> Pieces:
    """The codec at the middle of its range, and each format with the setting whose file is nearest in size.

    Args:
        image: mode RGB.
    """
    content = codec.encode(image, sum(codec.coarsest_and_finest) // 2)
    ours = codec.decode(parse(content, name))
    target = bits_per_pixel(content, image)
    whole = {OURS: (target, ours)}
    for each in FORMATS:
        found = _nearest(image, target, each.write, *each.reach)
        whole[each.name] = bits_per_pixel(found, image), read_format(found)
    box = _worst_box(image, ours)
    pieces = (Piece(key, rate, psnr(image, decoded), decoded.crop(box)) for key, (rate, decoded) in whole.items())
    return Pieces(name, image.crop(box), tuple(pieces))


def _nearest(
    image: Image.Image, target: float, write: Callable[[Image.Image, float], bytes], coarse: float, fine: float
) -> bytes:
    files = []
    for _ in range(ROUNDS):
        middle = (coarse + fine) / 2
        files.append(write(image, middle))
        coarse, fine = (coarse, middle) if bits_per_pixel(files[-1], image) > target else (middle, fine)
    return min(files, key=lambda content: abs(bits_per_pixel(content, image) - target))


def _worst_box(image: Image.Image, decoded: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the square with the largest squared error."""
    error = np.square(np.asarray(image).astype(np.int64) - np.asarray(decoded)).sum(axis=2)
    height, width = (min(SIDE, length) for length in error.shape)
    sums = np.pad(error.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = (int(place) for place in np.unravel_index(inside.argmax(), inside.shape))
    return left, top, left + width, top + height
