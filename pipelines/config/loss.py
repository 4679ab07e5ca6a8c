"""The choices of `loss`: what the training minimises."""

from typing import Literal

from pydantic import Field

from pipelines.config.section import Section

SMALLEST_MS_SSIM = 176
"""Pixels of a side that MS-SSIM is defined for: its window of 11 must fit at the coarsest of five scales."""


class LossConfig(Section):
    """What the training minimises."""

    distortion: Literal["mse", "l1", "ms_ssim"] = Field(
        default="mse", description="Distance of pixels on the scale 0 to 1, or 1 - MS-SSIM"
    )
    lambda_: float | None = Field(
        default=None,
        alias="lambda",
        gt=0,
        le=10,
        description="Weight of 255^2 * MSE, or of 1280 (1 - MS-SSIM), against bits per pixel, for a codec of one "
        "quality; null: 22 / step^2, for all steps at once",
    )
    quantizer_weight: float | None = Field(
        default=None,
        ge=0,
        le=1e4,
        description="Weight of the loss that vq and lfq have of their own, not of vq's moving averages; null: 0.1 of "
        "vq, 0.001 of lfq",
    )
    mask_weight: float = Field(
        default=4.0, ge=0, le=1e4, description="Weight of pixels inside a mask, where all others have 1"
    )
