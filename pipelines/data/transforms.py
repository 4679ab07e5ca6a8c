"""The way of a training sample: one random crop, magnification and flips, alike for an image and its mask.

What follows is `images.to_unit` and `Normalization.normalize`; the way back is `denormalize` and `to_levels` there.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from pipelines.config import DataConfig
from pipelines.data.png_reading import StoredPicture
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
        return self._apply(image, "bicubic")

    def apply_to_mask(self, mask: Image.Image) -> Image.Image:
        """The same pixels of the sample's mask; magnified without a filter, so that it keeps its values."""
        return self._apply(mask, "nearest")

    def put(self, picture: StoredPicture, target: np.ndarray) -> None:
        """The same levels of a stored picture or mask, of which no more is decoded than it needs.

        Args:
            target: (side, side, channels) uint8, such as a place in a batch; it is written to.

        Raises:
            ImageError: the picture cannot be decoded.
        """
        inside = 0 <= self.left <= picture.width - self.cut and 0 <= self.top <= picture.height - self.cut
        if not inside:
            levels = self._by_pillow(picture.part(0, 0, picture.width, picture.height))
        elif self.cut != self.side:
            levels = replace(self, left=0, top=0)._by_pillow(picture.part(self.left, self.top, self.cut, self.cut))
        else:
            levels = picture.part(self.left, self.top, self.cut, self.cut)
            levels = levels[:: -1 if self.flip else 1, :: -1 if self.mirror else 1]
        if self.mirror:  # pixel by pixel numpy would take four times as long as channel by channel
            for channel in range(levels.shape[2]):
                target[..., channel] = levels[..., channel]
        else:
            target[...] = levels

    def _by_pillow(self, levels: np.ndarray) -> np.ndarray:
        """`apply` or `apply_to_mask` of levels (H, W, 3) or (H, W, 1)."""
        is_mask = levels.shape[2] == 1
        image = Image.fromarray(levels[..., 0] if is_mask else levels)
        drawn = self.apply_to_mask(image) if is_mask else self.apply(image)
        return np.asarray(drawn).reshape(self.side, self.side, -1)

    def _apply(self, image: Image.Image, interpolation: Literal["bicubic", "nearest"]) -> Image.Image:
        # Late: with torchvision come its models and the compiler, a second and 160 MB, and most runs magnify nothing.
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms import functional as F

        image = F.crop(image, self.top, self.left, self.cut, self.cut)  # type: ignore[arg-type]
        if self.cut != self.side:
            image = F.resize(image, [self.side, self.side], InterpolationMode(interpolation))  # type: ignore[arg-type]
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
