"""The way of a picture, there and back: open, to tensor, to 0 ... 1, normalise; de-normalise, to levels, to picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipelines.config import NormalizationChoice
from pipelines.data.picture_limits import check_size
from pipelines.data.pixels import read_rgb
from pipelines.errors import CodecmillError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# torch is imported where it is needed only: the processes that cut patches open pictures without it.

WHITE = (255, 255, 255)
BLACK = (0, 0, 0)


class ImageError(CodecmillError):
    """A file is no picture that can be read; the message names the file and the reason."""


def open_image(
    source: Path | bytes, background: tuple[int, int, int] = WHITE, notes: list[str] | None = None
) -> Image.Image:
    """A picture of any kind as upright RGB; `pixels.read_rgb` says how each kind gets there.

    Args:
        background: what shows through transparent pixels.
        notes: takes what was amiss with it, though it could be read.

    Raises:
        ImageError: it is missing, damaged, cut short, too large or no picture.
    """
    return _open(source, background, manage_colour=True, notes=notes)


def open_mask(source: Path | bytes) -> Image.Image:
    """A mask of any kind as upright grey (mode L): its values as they are, transparent pixels black.

    Raises:
        ImageError: as `open_image`.
    """
    return _open(source, BLACK, manage_colour=False).convert("L")


def _open(
    source: Path | bytes, background: tuple[int, int, int], manage_colour: bool, notes: list[str] | None = None
) -> Image.Image:
    name = f"A picture of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        content = source if isinstance(source, bytes) else source.read_bytes()
        if not content:
            raise ValueError("it is empty")
        return read_rgb(content, background, manage_colour, notes)
    except MemoryError:
        raise
    except Exception as error:  # decoders that meet damaged or hostile bytes raise anything
        reason = str(error).strip().rstrip(".") or type(error).__name__
        if "cannot identify image file" in reason:
            reason = "its content is of no known image format"
        raise ImageError(f"{name} cannot be read as an image: {reason}.") from error


def decode_png(content: bytes | memoryview) -> Image.Image:
    """What `png_writing.write_png` was given; only for what codecmill itself has stored.

    Raises:
        ImageError: it was not stored by codecmill, for it is too large, damaged, or of another mode.
    """
    try:
        image = Image.open(BytesIO(content), formats=("PNG",))
        check_size(image)
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # as in `_open`
        raise ImageError(f"A stored picture of {len(content)} bytes cannot be decoded: {error}.") from error
    if image.mode not in ("RGB", "L"):
        raise ImageError(f"A stored picture of {len(content)} bytes has mode {image.mode}; codecmill stores RGB and L.")
    return image


def to_tensor(image: Image.Image) -> "Tensor":
    """(C, H, W) uint8, the 256 levels of a picture of mode RGB (C = 3) or L (1)."""
    import torch

    # By hand: torchvision loads its models and torch's compiler, two seconds and 160 MB of each process.
    levels = np.array(image).reshape(image.height, image.width, -1)
    return torch.from_numpy(levels).permute(2, 0, 1)


def to_image(levels: "Tensor") -> Image.Image:
    """The inverse of `to_tensor`, from any device."""
    pixels = np.ascontiguousarray(levels.cpu().permute(1, 2, 0).numpy())
    return Image.fromarray(pixels if len(levels) == 3 else pixels[:, :, 0])


def to_unit(levels: "Tensor", dtype: "torch.dtype") -> "Tensor":
    """Levels of any shape, uint8, on the scale 0 to 1."""
    # In place: a batch that is allocated once more for each operation costs more than they do.
    return levels.to(dtype, copy=True).div_(255)


def to_levels(x: "Tensor") -> "Tensor":
    """The inverse of `to_unit`: clamped to 0 ... 1 and rounded to uint8, half to even."""
    return (x.detach().double().clamp(0, 1) * 255).round().byte()


@dataclass(frozen=True)
class Normalization:
    """The one pair of constants with which a model's inputs are normalised, on the scale 0 to 1, red green blue."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if not all(std > 0 for std in self.std):
            raise CodecmillError(f"A normalisation needs standard deviations above 0, but got {self.std}.")

    def normalize(self, x: "Tensor") -> "Tensor":
        """(N, 3, H, W) on 0 to 1 becomes (x - mean) / std."""
        return (x - self._channels(self.mean, x)).div_(self._channels(self.std, x))

    def normalize_(self, x: "Tensor") -> "Tensor":
        """The same in place, for pictures that nobody needs as they were."""
        return x.sub_(self._channels(self.mean, x)).div_(self._channels(self.std, x))

    def denormalize(self, y: "Tensor") -> "Tensor":
        """(N, 3, H, W) normalised becomes y * std + mean: `normalize` undone."""
        return (y * self._channels(self.std, y)).add_(self._channels(self.mean, y))

    @staticmethod
    def _channels(values: Sequence[float], like: "Tensor") -> "Tensor":
        import torch  # as everywhere here: who only opens pictures does without

        # Filled in where they are: a copy out of the host's memory would wait for all that a GPU has to do.
        return torch.cat([like.new_full((1, 1, 1), value) for value in values])

    def as_json(self) -> dict[str, Any]:
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def resolve(cls, choice: str | NormalizationChoice, measured: "Normalization") -> "Normalization":
        """The constants that `data.normalization` stands for; `measured` is what the shard set says of its pictures."""
        if isinstance(choice, NormalizationChoice):
            return cls(choice.mean, choice.std)
        return {"imagenet": IMAGENET, "half": HALF, "dataset": measured}[choice]


IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Of ImageNet's training pictures, as torchvision's models have it."""

HALF = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""0 ... 1 becomes -1 ... 1."""
