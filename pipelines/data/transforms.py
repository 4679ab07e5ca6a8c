"""The way of a training sample: one random crop, magnification and flips, alike for an image and its mask.

What follows is `images.to_unit` and `Normalization.normalize`; the way back is `denormalize` and `to_levels` there.
"""

from dataclasses import dataclass

from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from pipelines.config import DataConfig
from pipelines.data.randomness import random_generator


@dataclass(frozen=True)
class Draw:
    """What is done to one sample in one epoch: a square of `cut` pixels becomes one of `side`, then is mirrored."""

    left: int
    top: int
    cut: int
    side: int
    mirror: bool = False
    flip: bool = False

    def apply(self, image: Image.Image) -> Image.Image:
        """The crop of an RGB picture; magnified with a bicubic filter."""
        return self._apply(image, InterpolationMode.BICUBIC)

    def apply_to_mask(self, mask: Image.Image) -> Image.Image:
        """The same pixels of the sample's mask; magnified without a filter, so that it keeps its values."""
        return self._apply(mask, InterpolationMode.NEAREST)

    def _apply(self, image: Image.Image, interpolation: InterpolationMode) -> Image.Image:
        image = F.crop(image, self.top, self.left, self.cut, self.cut)  # type: ignore[arg-type]
        if self.cut != self.side:
            image = F.resize(image, [self.side, self.side], interpolation)  # type: ignore[arg-type]
        if self.mirror:
            image = F.hflip(image)  # type: ignore[arg-type]
        return F.vflip(image) if self.flip else image  # type: ignore[arg-type]


def draw(data: DataConfig, crop_size: int, size: tuple[int, int], seed: int, epoch: int, key: str) -> Draw:
    """The random numbers of one sample in one epoch; the same wherever and whenever it is drawn.

    Args:
        crop_size: side of the result, in pixels.
        size: width and height of the stored patch, in pixels.
        key: the sample's.
    """
    random = random_generator(seed, epoch, key, "crop")
    width, height = size
    cut = min(round(crop_size / random.uniform(data.min_scale, data.max_scale)), width, height)
    return Draw(
        left=int(random.integers(width - cut + 1)),
        top=int(random.integers(height - cut + 1)),
        cut=cut,
        side=crop_size,
        mirror=data.flip_horizontal and bool(random.random() < 0.5),
        flip=data.flip_vertical and bool(random.random() < 0.5),
    )
