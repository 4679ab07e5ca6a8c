"""What the models say of an input that they cannot take."""

import torch
from torch import Tensor

from pipelines.errors import InputError


def check_images(x: Tensor, stride: int, dtype: torch.dtype) -> None:
    """That `x` is normalised images (N, 3, H, W) for a model of this stride, whose weights are of this type.

    Raises:
        InputError: it is not; the message says what to do.
    """
    if not x.is_floating_point():
        fix = "call model.reconstruct(image), or convert to floating point on 0 to 1 and normalise"
    elif x.dim() == 3:
        fix = "add the batch axis with x.unsqueeze(0), or call model.reconstruct(image)"
    elif x.dim() != 4 or x.shape[1] != 3:
        fix = "bring it to that layout, red, green and blue"
    elif x.numel() == 0:
        fix = "give it at least one image of at least one pixel"
    elif x.shape[2] % stride or x.shape[3] % stride:
        fix = f"make H and W multiples of {stride}, or call model.reconstruct(image), which pads and crops back"
    elif x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        fix = f"convert it to the type of the weights with x.to({dtype})"
    else:
        return
    raise InputError(f"The model takes normalised floating-point images (N, 3, H, W), but got {describe(x)}: {fix}.")


def describe(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"
