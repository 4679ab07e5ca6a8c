"""Of which images a codec's rate-distortion curves are: known before any is measured, by their sizes alone."""

from collections.abc import Iterable

from pipelines.config import EvaluationConfig

LARGEST_SIDE = 16_383
"""Of pictures that are measured, in pixels: WebP has no larger ones, JPEG none above 65,500, and an AVIF above 32,768
is written but cannot be read."""

MOST_PIXELS = 64_000_000
"""Of the pictures that curves are measured of, together: a megapixel takes half a minute, most of it in AVIF, and 24 of
a camera's photographs took hours."""


def fits_every_format(width: int, height: int) -> bool:
    """Whether a picture of that size, in pixels, is one that each format can hold."""
    return max(width, height) <= LARGEST_SIDE


def is_within(pixels: int, images: int, most: int) -> bool:
    """Whether the next image still has its curve: the first has, and others while there are pixels left for them.

    Args:
        pixels: of those up to here and of this one.
        images: up to here, a count.
        most: images, a count.
    """
    return images < most and (images == 0 or pixels <= MOST_PIXELS)


def bounded(choice: EvaluationConfig, sizes: Iterable[tuple[int, int]]) -> EvaluationConfig:
    """The choice with that number of `curve_images` of which there will be curves, where pixels bound it.

    So it is told apart which images a BD-rate is of. Where they do not bound it, the choice stays what it was.

    Args:
        sizes: width and height of all images, in their order.
    """
    pixels = images = 0
    for width, height in sizes:
        if images == choice.curve_images:
            break
        if fits_every_format(width, height):
            pixels += width * height
            if not is_within(pixels, images, choice.curve_images):
                return choice.model_copy(update={"curve_images": images})
            images += 1
    return choice
