"""An image as people have it, of any size, in bytes or on the scale 0 to 1, through a model that is stricter."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.errors import InputError
from pipelines.model.checked_input import describe

if TYPE_CHECKING:
    from pipelines.data.images import Normalization


def through(
    model_fn: Callable[[Tensor], Tensor],
    image: Tensor,
    normalization: "Normalization | None",
    stride: int,
    weight: Tensor,
) -> Tensor:
    """What becomes of an image: normalised, padded at the right and bottom, put through a model, and all of it undone.

    Args:
        model_fn: takes and returns normalised (N, 3, h, w) with h and w multiples of `stride`.
        image: (3, H, W) or (N, 3, H, W); uint8, or floating point on the scale 0 to 1.
        normalization: what the model was trained with; None where it sees the scale 0 to 1.
        weight: of the model: its type and its device are those that the model computes with.

    Returns:
        Floating point on the scale 0 to 1, not clamped, of the shape of `image`, on the model's device.

    Raises:
        InputError: the image has another shape or type.
    """
    is_image = image.dim() in (3, 4) and image.shape[-3] == 3 and image.numel()
    if not is_image or not (image.is_floating_point() or image.dtype == torch.uint8):
        raise InputError(
            "reconstruct takes images (3, H, W) or (N, 3, H, W), uint8 or floating point on 0 to 1, but got "
            f"{describe(image)}: convert it first."
        )
    pixels = image.to(weight.device, weight.dtype).reshape(-1, *image.shape[-3:])
    pixels = pixels if image.is_floating_point() else pixels / 255
    x = normalization.normalize(pixels) if normalization else pixels
    height, width = image.shape[-2:]
    decoded = model_fn(F.pad(x, (0, -width % stride, 0, -height % stride), mode="replicate"))
    decoded = normalization.denormalize(decoded) if normalization else decoded
    return decoded[..., :height, :width].reshape(image.shape)
