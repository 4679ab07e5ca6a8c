"""The rate-distortion curve of a codec, from real files, beside those of the formats that everybody has."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median
from typing import Annotated, Any

from PIL import Image
from pydantic import Field

from pipelines.codec.container import parse
from pipelines.codec.picture_codec import PictureCodec
from pipelines.codec.rate_control import bits_per_pixel
from pipelines.evaluation.curve_images import fits_every_format, is_within
from pipelines.evaluation.formats import FORMATS, Coder, read_format
from pipelines.evaluation.metrics import Decibels, Index, Quality, compare

OURS = "codecmill"
QUALITIES = (1.0, 20.0, 40.0, 60.0, 80.0, 100.0)

SMALLEST_DISSIMILARITY = 1e-10
"""1 - MS-SSIM of equal pictures: 100 dB, which their PSNR is, too."""

MOST_BITS = 1e6
"""A pixel of a picture of one pixel in any format, and more than that."""


@dataclass(frozen=True)
class Point:
    """One picture in one format at one setting.

    Attributes:
        bits_per_pixel: of the whole file and the unpadded picture.
        encode_seconds, decode_seconds: from picture to bytes and back.
    """

    image: str
    codec: str
    setting: float
    bits_per_pixel: Annotated[float, Field(gt=0, le=MOST_BITS)]
    psnr: Decibels
    ms_ssim: Index | None
    encode_seconds: Annotated[float, Field(ge=0)]
    decode_seconds: Annotated[float, Field(ge=0)]


def points_of(
    codec: PictureCodec, name: str, image: Image.Image, qualities: Sequence[float] = QUALITIES
) -> list[Point]:
    """Of one picture (mode RGB): the codec's, then those of each format.

    A codec of one step has one point, for all qualities are the same file.
    """
    steps = {codec.step_of(quality): quality for quality in reversed(qualities)}

    def write(picture: Image.Image, quality: float) -> bytes:
        return codec.encode(picture, codec.step_of(quality))

    def read(content: bytes) -> Image.Image:
        return codec.decode(parse(content, name))

    found = [_point(OURS, name, image, quality, write, read) for quality in reversed(steps.values())]
    for each in FORMATS:
        found += [_point(each.name, name, image, setting, each.write, read_format) for setting in each.settings]
    return found


def _point(
    codec: str, name: str, image: Image.Image, setting: float, write: Coder, read: Callable[[bytes], Image.Image]
) -> Point:
    begun = time.perf_counter()
    content = write(image, setting)
    written = time.perf_counter()
    decoded = read(content)
    done = time.perf_counter()
    quality: Quality = compare(image, decoded)
    rate = bits_per_pixel(content, image)
    return Point(name, codec, setting, rate, quality.psnr, quality.ms_ssim, written - begun, done - written)


class Measuring:
    """Takes the points of the first pictures that fit every format, until there are enough of them or of their pixels.

    Args:
        codec: None where no curves are measured.
        most: pictures, a count.

    Attributes:
        points: so far, each picture's under a name of its own.
    """

    def __init__(self, codec: PictureCodec | None, most: int):
        self.points: list[Point] = []
        self._names: set[str] = set()
        self._codec = codec
        self._most = most
        self._pixels = 0

    def offer(self, number: int, name: str, image: Image.Image) -> None:
        """Measure a picture (mode RGB) if it belongs here; its number tells it from others of its name."""
        if self._codec is None or not fits_every_format(*image.size):
            return
        self._pixels += image.width * image.height  # once there are too many, there are for good
        if not is_within(self._pixels, len(self._names), self._most):
            return
        while name in self._names:
            name += f" ({number})"
        self._names.add(name)
        self.points += points_of(self._codec, name, image)


@dataclass(frozen=True)
class RateDistortion:
    """What was measured on some pictures: every point of the codec, and of the formats on the same pictures."""

    points: tuple[Point, ...]

    @cached_property
    def curves(self) -> dict[str, list["CurvePoint"]]:
        """Each codec's means over the pictures, in the order of its settings."""
        return curves(self.points)

    @property
    def anchors(self) -> list[str]:
        """The formats that the codec is compared with."""
        return [codec for codec in self.curves if codec != OURS]

    @property
    def images(self) -> list[str]:
        """The pictures' names, each once."""
        return list(dict.fromkeys(point.image for point in self.points))

    def bd_rate(self, anchor: str, metric: str = "psnr", image: str | None = None) -> float | None:
        """Of the codec against a format, in percent of its bits: over all pictures, or of one."""
        found = self.curves_of(metric) if image is None else self._curves_of(metric, image)
        return bd_rate(found.get(OURS, ()), found.get(anchor, ()), metric)

    def curves_of(self, metric: str) -> dict[str, list["CurvePoint"]]:
        """As `curves`, but over those pictures alone that have the metric, in bits as well."""
        return self.curves if metric == "psnr" else self._curves_of(metric)

    def _curves_of(self, metric: str, image: str | None = None) -> dict[str, list["CurvePoint"]]:
        measured = (point for point in self.points if image in (None, point.image))
        return curves(point for point in measured if getattr(point, metric) is not None)

    def seconds(self, codec: str) -> tuple[float, float]:
        """Median times of encoding and of decoding a picture."""
        mine = [point for point in self.points if point.codec == codec]
        return median(point.encode_seconds for point in mine), median(point.decode_seconds for point in mine)


@dataclass(frozen=True)
class CurvePoint:
    """The mean over all pictures at one setting; `ms_ssim`, in dB, of those that are large enough for it."""

    setting: float
    bits_per_pixel: float
    psnr: float
    ms_ssim: float | None


def curves(points: Iterable[Point]) -> dict[str, list[CurvePoint]]:
    """Each codec's curve, in the order of its settings."""
    groups: dict[str, dict[float, list[Point]]] = {}
    for point in points:
        groups.setdefault(point.codec, {}).setdefault(point.setting, []).append(point)
    return {codec: [_mean(each) for each in settings.values()] for codec, settings in groups.items()}


def _mean(points: list[Point]) -> CurvePoint:
    indices = [point.ms_ssim for point in points if point.ms_ssim is not None]
    return CurvePoint(
        points[0].setting,
        fmean(point.bits_per_pixel for point in points),
        fmean(point.psnr for point in points),
        _in_decibels(fmean(indices)) if indices else None,
    )


def _in_decibels(ms_ssim: float) -> float:
    """-10 log10(1 - MS-SSIM), as codecs are compared by it: near 1 the index itself hardly tells them apart."""
    return -10 * math.log10(max(1 - ms_ssim, SMALLEST_DISSIMILARITY))


def bd_rate(curve: Sequence[CurvePoint], anchor: Sequence[CurvePoint], metric: str = "psnr") -> float | None:
    """How many percent more bits than the anchor a curve takes for the same metric (Bjøntegaard 2001, VCEG-M33).

    Piecewise cubic (PCHIP) over the range of the metric, in dB, that both have; None where there is none.
    """
    import bjontegaard  # late: it brings matplotlib along

    if any(getattr(point, metric) is None for point in [*curve, *anchor]):
        return None
    mine, theirs = (
        _rising([(point.bits_per_pixel, getattr(point, metric)) for point in each]) for each in (curve, anchor)
    )
    if min(len(mine), len(theirs)) < 2 or min(mine[-1][1], theirs[-1][1]) <= max(mine[0][1], theirs[0][1]):
        return None
    columns = [[each[column] for each in pairs] for pairs in (theirs, mine) for column in (0, 1)]
    found: Any = bjontegaard.bd_rate(*columns, method="pchip", require_matching_points=False, min_overlap=0)
    return float(found)


def _rising(pairs: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Rates and values without the settings that cost more for no more: a curve can be read in both directions."""
    kept: list[tuple[float, float]] = []
    for rate, value in sorted(pairs, key=lambda pair: (pair[0], -pair[1])):
        if not kept or value > kept[-1][1]:
            kept.append((rate, value))
    return kept
