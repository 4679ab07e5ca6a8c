"""A file of a wanted size: the quantiser's step is sought by bisection."""

from typing import NamedTuple

from PIL import Image

from pipelines.codec.picture_codec import PictureCodec


class Sized(NamedTuple):
    """The file nearest to the wanted size.

    Attributes:
        content: of the file.
        step: 256 log2 of its step.
        is_reached: whether the wanted size lies between those that the model can write.
    """

    content: bytes
    step: int
    is_reached: bool


def bits_per_pixel(content: bytes, image: Image.Image) -> float:
    """Of a whole file, its header included."""
    return len(content) * 8 / (image.width * image.height)


def encode_to_rate(codec: PictureCodec, image: Image.Image, target: float) -> Sized:
    """The file whose bits per pixel are nearest to `target`, all of the file counted."""
    low, high = sorted(codec.coarsest_and_finest)  # the low step makes the larger file
    files = {step: codec.encode(image, step) for step in (low, high)}
    is_reached = bits_per_pixel(files[high], image) <= target <= bits_per_pixel(files[low], image)
    while high - low > 1 and is_reached:
        middle = (low + high) // 2
        files[middle] = codec.encode(image, middle)
        low, high = (middle, high) if bits_per_pixel(files[middle], image) > target else (low, middle)
    nearest = min(files, key=lambda step: abs(bits_per_pixel(files[step], image) - target))
    return Sized(files[nearest], nearest, is_reached)
