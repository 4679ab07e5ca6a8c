"""How far a reconstruction is from its image: what training minimises, and the PSNR that people read."""

import math
from typing import overload

import torch
from torch import Tensor

from pipelines.config import LAMBDA_STEP_SQUARED, LossConfig
from pipelines.errors import CodecmillError
from pipelines.model import structural_similarity

MS_SSIM_SCALE = 1280.0
"""What stands for 255^2 where the distortion is 1 - MS-SSIM: lambdas of the same codecs in the literature, compared."""


def distortion(config: LossConfig, reconstruction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean distance of each sample, (N,), of pixels weighted towards a region of interest, or `1 - MS-SSIM`.

    A pixel has the weight `1 + (mask_weight - 1) * mask`: 1 outside the mask, `mask_weight` inside, and between them
    where the mask is grey. The weighted sum is divided by the sum of the weights, so that a uniform error costs the
    same whatever the mask. A sample whose weights sum to 0 (weight 0 and a mask over everything) has loss 0 and no
    gradient.

    Args:
        config: which distance, and the weight inside the mask, which MS-SSIM has no use for.
        reconstruction, target: (N, C, H, W) on the scale 0 to 1.
        mask: (N, 1, H, W), uint8 0 to 255 or bool or floating point 0 to 1; None weighs all pixels alike.

    Returns:
        float32, or float64 where an input is float64.

    Raises:
        CodecmillError: shapes that do not belong together, or a mask of another type.
    """
    if reconstruction.dim() != 4 or reconstruction.shape != target.shape:
        raise CodecmillError(
            f"The distortion compares two (N, C, H, W) of one shape, but got {tuple(reconstruction.shape)} "
            f"and {tuple(target.shape)}: crop or pad one to the other."
        )
    if config.distortion == "ms_ssim":
        return 1 - _ms_ssim(reconstruction, target)
    dtype = torch.promote_types(torch.promote_types(reconstruction.dtype, target.dtype), torch.float32)
    difference = reconstruction.to(dtype) - target.to(dtype)
    pixels = (difference.square() if config.distortion == "mse" else difference.abs()).mean(dim=1)
    if mask is None:
        return pixels.mean(dim=(1, 2))
    weight = 1 + (config.mask_weight - 1) * _mask_fraction(mask, target, dtype)
    total = weight.sum(dim=(1, 2))
    return (weight * pixels).sum(dim=(1, 2)) / torch.where(total > 0, total, 1.0)


def _ms_ssim(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Of each sample, in float32 or wider."""
    with torch.autocast(target.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(reconstruction.dtype, target.dtype), torch.float32)
        return structural_similarity.ms_ssim(reconstruction.to(dtype), target.to(dtype))


def _mask_fraction(mask: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as (N, H, W) on the scale 0 to 1."""
    expected = (target.shape[0], 1, *target.shape[2:])
    known = mask.is_floating_point() or mask.dtype in (torch.uint8, torch.bool)
    if mask.shape != expected or not known:
        raise CodecmillError(
            f"The mask must be {expected}, uint8 0 to 255 or floating point 0 to 1, but is {tuple(mask.shape)} "
            f"{mask.dtype}: cut it with the same box as its image."
        )
    fraction = mask.to(dtype).squeeze(1)
    return fraction / 255 if mask.dtype == torch.uint8 else fraction


def rate_distortion(config: LossConfig, bits_per_pixel: Tensor, distortion: Tensor, step: Tensor) -> Tensor:
    """`R + lambda * 255^2 * D` of each sample, (N,), in the field's scale (Minnen 2018, arXiv:1809.02736).

    With MS-SSIM it is `R + 1280 * lambda * D`, which asks for about the same rates. Without a `loss.lambda`, lambda
    follows the quantiser's step as the optimum does, `22 / step^2`, and the loss is multiplied by `sqrt(step / 48)`, so
    that coarse and fine steps pull alike on weights that they share.

    Args:
        bits_per_pixel, distortion, step: (N,); the distortion on the scale 0 to 1, the step in grey levels.
    """
    scaled = (MS_SSIM_SCALE if config.distortion == "ms_ssim" else 255**2) * distortion
    if config.lambda_ is not None:
        return bits_per_pixel + config.lambda_ * scaled
    return (bits_per_pixel + LAMBDA_STEP_SQUARED / step**2 * scaled) * (step / 48).sqrt()


@overload
def psnr(mse: Tensor) -> Tensor: ...
@overload
def psnr(mse: float) -> float: ...
def psnr(mse: Tensor | float) -> Tensor | float:
    """Peak signal to noise ratio in dB, `-10 log10(mse)`, for a peak of 1; infinite where the mse is 0.

    Args:
        mse: mean squared error on the scale 0 to 1; a tensor of any shape or a number.
    """
    if isinstance(mse, Tensor):
        return -10 * torch.log10(mse)
    return -10 * math.log10(mse) if mse else math.inf
