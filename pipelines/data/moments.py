"""Sums over pixels from which mean and standard deviation follow: integers, so that no order of adding matters."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

_LEVELS = np.arange(256, dtype=np.int64)


@dataclass
class Moments:
    """Number of pixels, and for red, green and blue the sum of the levels (0 to 255) and of their squares."""

    pixels: int = 0
    sums: list[int] = field(default_factory=lambda: [0, 0, 0])
    squares: list[int] = field(default_factory=lambda: [0, 0, 0])

    def add(self, image: Image.Image) -> None:
        """Take in a picture (mode RGB)."""
        counts = np.array(image.histogram(), dtype=np.int64).reshape(3, 256)
        self.pixels += image.width * image.height
        for channel, (levels, squares) in enumerate(zip(counts @ _LEVELS, counts @ _LEVELS**2, strict=True)):
            self.sums[channel] += int(levels)
            self.squares[channel] += int(squares)
