"""The choices of `evaluation`: what is evaluated, and what makes a champion."""

from typing import Literal

from pydantic import Field

from pipelines.config.section import Section


class EvaluationConfig(Section):
    """What is evaluated, and what makes a champion."""

    images: str | None = Field(
        default=None,
        min_length=1,
        description="Other images to evaluate, too (by `evaluate` them alone): as data.images",
    )
    tile_size: int = Field(
        default=1024,
        ge=64,
        le=65_536,
        description="Images with a longer side are computed in tiles of this side, in pixels; without a trace of it "
        "where that is four times as far as the model sees",
    )
    pictures: int = Field(default=64, ge=0, le=100_000, description="Most images that pictures are written of, a count")
    curve_images: int = Field(
        default=24,
        ge=0,
        le=100_000,
        description="Images of a codec's rate-distortion curves, the first that fit every format, a count; 0: none. "
        "Of 64 megapixels together at most, but of one at least",
    )
    promotion_metric: Literal["psnr", "ms_ssim", "bd_rate", "bd_rate_ms_ssim"] = Field(
        default="psnr",
        description="What decides on the champion; bd_rate: a codec's bits at equal PSNR, in percent of JPEG's; "
        "bd_rate_ms_ssim: at equal MS-SSIM in dB",
    )
    promotion_margin: float = Field(
        default=0.0, ge=0, description="By how much the champion must be beaten, in the metric's unit"
    )
