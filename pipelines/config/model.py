"""The choices of `model`: the encoder-decoder, its quantiser and its entropy model."""

from typing import Literal

from pydantic import Field, model_validator

from pipelines.config.section import Section

SMALLEST_STEP, LARGEST_STEP = 2.0, 256.0
"""Of a codec's quantiser, in grey levels."""

LAMBDA_STEP_SQUARED = 22.0
"""lambda times the square of the quantiser's step, in grey levels, at the best step: measured on photographs."""


class ModelConfig(Section):
    """The encoder-decoder."""

    quantizer: Literal[
        "round",
        "clamped_round",
        "sign",
        "soft_to_hard",
        "noise",
        "universal",
        "binarizer",
        "fsq",
        "vq",
        "lfq",
        "gumbel",
    ] = Field(default="round", description="Straight-through layer between encoder and decoder")
    channels: int = Field(default=64, ge=4, le=2048, description="Width of the hidden layers, in channels")
    latent_channels: int = Field(default=24, ge=1, le=2048, description="Width of the quantised latents, in channels")
    downsamplings: int = Field(
        default=3, ge=1, le=6, description="Stride-2 stages of the encoder: 3 make one latent from 8x8 pixels"
    )
    residual_blocks: int = Field(default=1, ge=0, le=64, description="Residual blocks after each stage, a count")
    levels: int = Field(
        default=8, ge=2, le=256, description="Values that clamped_round, soft_to_hard and fsq may take, a count"
    )
    sigma: float = Field(
        default=1.0, gt=0, le=1e4, description="Hardness of the soft assignment of soft_to_hard, per squared unit"
    )
    final_sigma: float | None = Field(
        default=None, gt=0, le=1e4, description="What sigma grows to until the last step; null: it stays"
    )
    codes: int = Field(default=512, ge=2, le=65_536, description="Size of the codebook of vq and gumbel, a count")
    code_channels: int = Field(
        default=4, ge=1, le=2048, description="Latent channels that share a code of vq or gumbel, a count"
    )
    codebook_decay: float | None = Field(
        default=0.99,
        ge=0,
        lt=1,
        description="Codes of vq are moving averages that keep this share a step; null: learned by the loss",
    )
    rotation_trick: bool = Field(default=False, description="Lead the gradient of vq along a rotation")
    temperature: float = Field(default=1.0, gt=0, le=1e4, description="Softness of the draws of gumbel")
    entropy: Literal["none", "factorized", "hyperprior"] = Field(
        default="none",
        description="Entropy model of the latents, which makes the model a codec that writes files; its quantiser "
        "rounds, with steps from finest_step to coarsest_step",
    )
    entropy_channels: int = Field(
        default=96, ge=4, le=2048, description="Width of the hyperprior's networks, in channels"
    )
    hyper_channels: int = Field(default=32, ge=1, le=2048, description="Width of the hyper-latents, in channels")
    context: Literal["checkerboard", "nested"] = Field(
        default="nested",
        description="How a hyperprior's latents predict each other: in two passes over a checkerboard, or in five over "
        "grids within grids",
    )
    finest_step: float | None = Field(
        default=None,
        ge=SMALLEST_STEP,
        le=LARGEST_STEP,
        description="Smallest quantiser step of a codec, in grey levels; null: 14, or what suits loss.lambda",
    )
    coarsest_step: float | None = Field(
        default=None,
        ge=SMALLEST_STEP,
        le=LARGEST_STEP,
        description="Largest quantiser step of a codec, in grey levels; null: 130, or what suits loss.lambda",
    )

    @property
    def step_range(self) -> tuple[float, float]:
        """The finest and the coarsest step, in grey levels."""
        return self.finest_step or 14.0, self.coarsest_step or 130.0

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        finest, coarsest = self.step_range
        if finest > coarsest:
            raise ValueError(f"finest_step {finest:g} is above coarsest_step {coarsest:g}")
        if self.quantizer in ("vq", "gumbel") and self.latent_channels % self.code_channels:
            raise ValueError(
                f"latent_channels {self.latent_channels} is no multiple of code_channels {self.code_channels}"
            )
        if self.entropy != "none" and self.quantizer != "round":
            raise ValueError(f"an entropy model takes quantizer round, not {self.quantizer}")
        return self
