"""The same piece of a picture in every format, at the rate that the codec takes: where the codec errs most."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.codec.container import parse
from pipelines.codec.picture_codec import PictureCodec
from pipelines.codec.rate_control import bits_per_pixel
from pipelines.evaluation.formats import FORMATS, read_format
from pipelines.evaluation.metrics import LARGEST_PSNR, psnr
from pipelines.evaluation.rate_distortion import OURS

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
    box = worst_box(image, ours)
    pieces = (
        Piece(key, rate, min(psnr(image, decoded), LARGEST_PSNR), decoded.crop(box))
        for key, (rate, decoded) in whole.items()
    )
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


def worst_box(image: Image.Image, decoded: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the square with the largest squared error.

    Row by row, for sums over a whole picture take 50 bytes a pixel: gigabytes for a camera's.
    """
    original, found = np.asarray(image), np.asarray(decoded)
    height, width = min(SIDE, image.height), min(SIDE, image.width)
    columns = np.zeros(image.width, dtype=np.int64)  # the errors of each column in the rows from `top` on
    worst, place = -1, (0, 0)
    for bottom in range(1, image.height + 1):
        columns += _row_of_errors(original, found, bottom - 1)
        top = bottom - height
        if top < 0:
            continue
        sums = np.concatenate([[0], columns.cumsum()])
        inside = sums[width:] - sums[:-width]
        left = int(inside.argmax())
        if inside[left] > worst:
            worst, place = int(inside[left]), (left, top)
        columns -= _row_of_errors(original, found, top)
    return *place, place[0] + width, place[1] + height


def _row_of_errors(original: np.ndarray, found: np.ndarray, row: int) -> np.ndarray:
    """The squared errors of a row's pixels, int64 (W,)."""
    return np.square(original[row].astype(np.int64) - found[row]).sum(axis=1)
