"""Where patches are cut from an image, and which of them are worth keeping."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from PIL import Image, ImageStat

from pipelines.config import Section
from pipelines.data.randomness import random_generator

TRIES = 8
"""Random places looked at for each patch that is wanted, where flat ones are passed over."""

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels."""


class PatchSettings(Section):
    """The part of a config that decides on patches; its fields are those of `DataConfig`."""

    patch_size: int
    patches: Literal["grid", "random"]
    max_patches_per_image: int
    min_detail: float
    small_images: Literal["skip", "pad", "resize"]
    background: tuple[int, int, int]
    seed: int | None


def enlarged_size(size: tuple[int, int], settings: PatchSettings) -> tuple[int, int]:
    """Width and height, in pixels, of what `enlarge` makes of an image of this width and height."""
    side = settings.patch_size
    if min(size) >= side or settings.small_images == "skip":
        return size
    factor = side / min(size) if settings.small_images == "resize" else 1
    return max(side, round(size[0] * factor)), max(side, round(size[1] * factor))


def enlarge(
    image: Image.Image, mask: Image.Image | None, settings: PatchSettings
) -> tuple[Image.Image, Image.Image | None]:
    """Image and mask, at least as large as a patch where `small_images` says so.

    'pad' repeats the last row and column to the right and below; 'resize' scales the shorter side to the patch size
    (bicubic; the mask nearest). What is large enough stays as it is.
    """
    size = enlarged_size(image.size, settings)
    if size == image.size:
        return image, mask
    if settings.small_images == "pad":
        return _pad(image, size), _pad(mask, size) if mask else None
    resized = image.resize(size, Image.Resampling.BICUBIC)
    return resized, mask.resize(size, Image.Resampling.NEAREST) if mask else None


def _pad(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    pixels = np.asarray(image)
    missing = [(0, size[1] - image.height), (0, size[0] - image.width), (0, 0)]
    return Image.fromarray(np.pad(pixels, missing[: pixels.ndim], mode="edge"))


def choose_patches(image: Image.Image, settings: PatchSettings, source: str) -> list[Box]:
    """The boxes of an image's patches, top to bottom and left to right for a grid, as drawn for random ones.

    Args:
        source: hash of the image's content; with the seed it decides on all that is left to chance.
    """
    chosen: list[Box] = []
    columns, rows = image.width // settings.patch_size, image.height // settings.patch_size
    most = min(columns * rows, settings.max_patches_per_image)
    for box in _candidates(image.size, settings, source):
        if settings.min_detail == 0 or detail(image.crop(box)) >= settings.min_detail:
            chosen.append(box)
            if len(chosen) == most:
                break
    return sorted(chosen, key=lambda box: (box[1], box[0])) if settings.patches == "grid" else chosen


def detail(patch: Image.Image) -> float:
    """Standard deviation of a patch's grey levels, in levels of 255."""
    return ImageStat.Stat(patch.convert("L")).stddev[0]


def _candidates(size: tuple[int, int], settings: PatchSettings, source: str) -> Iterator[Box]:
    """Boxes in the order in which they are looked at."""
    side = settings.patch_size
    columns, rows = size[0] // side, size[1] // side
    if columns * rows == 0:
        return
    corners = _grid(size, side, source) if settings.patches == "grid" else _places(size, settings, source)
    for left, top in corners.tolist():
        yield (left, top, left + side, top + side)


def _grid(size: tuple[int, int], side: int, source: str) -> np.ndarray:
    """Corners (n, 2) side by side, centred, so that what fills no patch is lost on all sides alike.

    They come in an order of chance, so that a cap takes patches from all over the image.
    """
    columns, rows = size[0] // side, size[1] // side
    order = np.argsort(_raw(columns * rows, "grid", source), kind="stable")
    first = np.array([(size[0] - columns * side) // 2, (size[1] - rows * side) // 2])
    return first + np.stack([order % columns, order // columns], axis=1) * side


def _places(size: tuple[int, int], settings: PatchSettings, source: str) -> np.ndarray:
    """Corners (n, 2) anywhere: as many as a grid would have, or more to choose from where flat ones are passed over."""
    side = settings.patch_size
    wanted = min((size[0] // side) * (size[1] // side), settings.max_patches_per_image)
    tries = wanted * (TRIES if settings.min_detail else 1)
    drawn = _raw(2 * tries, "patches", settings.seed or 0, source).reshape(tries, 2)
    return (drawn % np.array([size[0] - side + 1, size[1] - side + 1], dtype=np.uint64)).astype(np.int64)


def _raw(count: int, *key: int | str) -> np.ndarray:
    """Raw 64-bit numbers: unlike numpy's distributions they never change with its version."""
    return random_generator(*key).bit_generator.random_raw(count)
