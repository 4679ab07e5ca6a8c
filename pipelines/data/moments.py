"""Sums over pixels from which mean and standard deviation follow: integers, so that no order of adding matters."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

_LEVELS = np.arange(256, dtype=np.int64)


@dataclass
class Moments:
    """Of pictures: pixels, and for red, green and blue the sum of the levels (0 to 255) and of their squares.

    Attributes:
        counts: of each level, int64 (3, 256).
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), np.int64))

    def add(self, image: Image.Image) -> None:
        """Take in a picture (mode RGB)."""
        self.counts += np.array(image.histogram(), np.int64).reshape(3, 256)

    @property
    def pixels(self) -> int:
        return int(self.counts[0].sum())

    @property
    def sums(self) -> list[int]:
        return (self.counts @ _LEVELS).tolist()

    @property
    def squares(self) -> list[int]:
        return (self.counts @ _LEVELS**2).tolist()
