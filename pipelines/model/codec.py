"""A transform codec: images to latents, quantised with a step that is chosen at use, and what they cost in bits."""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from pipelines.config import ModelConfig
from pipelines.errors import CodecmillError
from pipelines.model.any_image import through
from pipelines.model.arithmetic import FRACTION, exact_power
from pipelines.model.checked_input import check_images
from pipelines.model.entropy import laplace
from pipelines.model.entropy.coding import SymbolCoder
from pipelines.model.entropy.factorized import Factorized
from pipelines.model.entropy.hyperprior import HYPER_STRIDE, Hyperprior
from pipelines.model.tiling import regions
from pipelines.model.transforms import Analysis, Bottleneck, Network, Synthesis

if TYPE_CHECKING:
    from pipelines.data.images import Normalization

MIDDLE = 5.5
"""log2 of the step that the networks see as zero."""

REGION = 256
"""Latents, in each direction, that are coded together; others tell nothing of them, so that memory does not grow with
the picture. Photographs cut to 256 take 0.2 % more bytes than whole, cut to 128 they take 0.8 %."""

STEP_FRACTION = 8
"""Bits after the point of a step's logarithm: what a file holds is 256 log2(step), a whole number."""


class Coded(NamedTuple):
    """What becomes of images.

    Attributes:
        image: (N, 3, H, W), normalised.
        latents: quantised, in steps, (N, L, h, w).
        bits: of each part, (N, P).
        step: of the quantiser, in grey levels, (N,).
    """

    image: Tensor
    latents: Tensor
    bits: Tensor
    step: Tensor


class TransformCodec(nn.Module):
    """`Analysis -> quantiser -> Synthesis` with an entropy model, for a whole range of quantiser steps.

    Args:
        config: sizes, entropy model, and the range of the step.

    Attributes:
        stride: pixels a latent, in each direction; H and W must be multiples of it.
        parts: what the columns of `Coded.bits` are.
        encoding: how the names of parameters begin that decide on the symbols.
        units: types of its parts that are called once, and whose weights can be elsewhere until then.
        hard: of no dimension, whether training goes on with rounded latents and an encoder that stays.
        tables: of the probabilities that symbols are coded with, `laplace.frequency_tables`.
    """

    units = (Bottleneck, Network, Hyperprior)
    encoding = ("encoder.", "entropy.analysis.", "gain")
    hard: Tensor
    tables: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.stride = 2**config.downsamplings
        self.encoder = Analysis(config)
        self.decoder = Synthesis(config)
        self.entropy = _entropy_model(config)
        self.gain = nn.Parameter(torch.zeros(config.latent_channels, 1, 1))
        self.gain_slope = nn.Parameter(torch.zeros(config.latent_channels, 1, 1))
        self.register_buffer("hard", torch.tensor(False), persistent=False)
        self.register_buffer("tables", laplace.frequency_tables())

    @property
    def parts(self) -> tuple[str, ...]:
        return self.entropy.parts

    def forward(self, x: Tensor, noise: Tensor | None = None, step: Tensor | None = None) -> Coded:
        """Encode, quantise and decode.

        Args:
            x: normalised images (N, 3, H, W), floating point.
            noise: of `noise_shape(N, H, W)`, uniform on [-0.5, 0.5), in training.
            step: (N,) in grey levels; by default in training `drawn_step(noise)`, else the middle of the range.

        Raises:
            InputError: x has another shape or type; the message says what to do.
            CodecmillError: the noise is missing or has another shape.
        """
        check_images(x, self.stride, self.gain.dtype)
        noise = self._checked_noise(x, noise)
        if step is None:
            step = self.middle_step(x) if noise is None else self.drawn_step(noise)
        return self._coded(x, noise, step.to(x.dtype))

    def _coded(self, x: Tensor, noise: Tensor | None, step: Tensor) -> Coded:
        """As `forward`, with nothing to be checked or found any more."""
        levels, log2_step = self.levels(step)
        y = self.encoder(x, levels, log2_step)
        quantised, bits = self.entropy(y, log2_step, None if noise is None else noise[:, 1:], self.hard)
        return Coded(self.decoder(quantised, levels, log2_step), quantised, bits, step)

    def levels(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Of steps (N,) in grey levels: each channel's (N, L, 1, 1), and the normalised logarithm (N, 1, 1, 1)."""
        log2_step = torch.log2(step)[:, None, None, None] - MIDDLE
        return step[:, None, None, None] / self._gain(log2_step), log2_step

    def noise_shape(self, n: int, h: int, w: int) -> tuple[int, int]:
        """Random numbers that training on n images of h x w pixels takes: one row an image, the step's first."""
        return n, 1 + self.entropy.noise_size(h // self.stride, w // self.stride)

    def drawn_step(self, noise: Tensor) -> Tensor:
        """The step of each image, (N,) in grey levels, log-uniform over the range, from its row of noise."""
        finest, coarsest = (math.log2(step) for step in self.config.step_range)
        return torch.exp2(finest + (noise[:, 0] + 0.5) * (coarsest - finest))

    def middle_step(self, x: Tensor) -> Tensor:
        """The geometric mean of the range, for each image: (N,)."""
        return torch.full((len(x),), math.sqrt(math.prod(self.config.step_range)), dtype=x.dtype, device=x.device)

    @torch.no_grad()
    def reconstruct(
        self, image: Tensor, normalization: "Normalization | None" = None, step: float | None = None
    ) -> Tensor:
        """What becomes of an image of any size: padded at the right and bottom to the stride, coded, cropped back.

        Quantises as in evaluation, whatever mode the model is in.

        Args:
            image: (3, H, W) or (N, 3, H, W); uint8, or floating point on the scale 0 to 1.
            normalization: what the model was trained with; by default the model sees the scale 0 to 1.
            step: of the quantiser, in grey levels; by default the middle of the range.

        Returns:
            Floating point on the scale 0 to 1, not clamped, of the shape of `image`, on the model's device.

        Raises:
            InputError: the image has another shape or type.
        """

        def evaluated(x: Tensor) -> Tensor:
            steps = self.middle_step(x) if step is None else x.new_full((len(x),), step)
            return self._coded(x, None, steps).image

        return through(evaluated, image, normalization, self.stride, self.gain)

    @torch.no_grad()
    def analyse(self, x: Tensor, step: int) -> Tensor:
        """Latents (1, L, h, w), in steps, of a normalised image (1, 3, H, W).

        Args:
            step: 256 log2 of the step in grey levels.
        """
        return self.encoder(x, *self._levels(step))

    @torch.no_grad()
    def synthesise(self, latents: Tensor, step: int) -> Tensor:
        """A normalised image (1, 3, H, W) of quantised latents (1, L, h, w): the same bits on every machine."""
        return self.decoder.exact(latents.double(), self._exact_levels(step), step / 2**STEP_FRACTION - MIDDLE)

    @torch.no_grad()
    def write(self, y: Tensor, step: int, coder: SymbolCoder) -> None:
        """Write the latents of one image, (1, L, h, w) on the CPU, where the entropy model computes exactly.

        Raises:
            CodecmillError: they, or the gains that they are to be read with, are not finite.
        """
        self._exact_levels(step)
        for region in regions(y.shape[-2:], REGION, HYPER_STRIDE):
            part = y[(..., *region)]
            self.entropy.code(coder, part, (part.shape[-2], part.shape[-1]), _fixed_log2_step(step))

    @torch.no_grad()
    def read(self, size: tuple[int, int], step: int, coder: SymbolCoder) -> Tensor:
        """The quantised latents (1, L, h, w) of one image, float32, which holds those of up to 1,024 steps exactly.

        Args:
            size: h and w.
        """
        latents = torch.empty(1, len(self.gain), *size, dtype=torch.float32, device="cpu")
        for region in regions(size, REGION, HYPER_STRIDE):
            part = latents[(..., *region)]
            part.copy_(self.entropy.code(coder, None, (part.shape[-2], part.shape[-1]), _fixed_log2_step(step)))
        return latents

    @torch.no_grad()
    def quantise(self, y: Tensor, log2_step: Tensor) -> None:
        """Replace the latents of one image, (1, L, h, w) on any device, by what `read` finds, up to rounding.

        Args:
            log2_step: of `levels`.
        """
        for region in regions(y.shape[-2:], REGION, HYPER_STRIDE):
            part = y[(..., *region)]
            part.copy_(self.entropy(part.to(log2_step.device), log2_step, None, self.hard)[0])

    def _exact_levels(self, step: int) -> Tensor:
        """As `_levels`, to the bit the same on every machine, in float64."""
        log2_step = step / 2**STEP_FRACTION
        gains = zip(self.gain.flatten().tolist(), self.gain_slope.flatten().tolist(), strict=True)
        levels = [exact_power(log2_step, -gain - slope * (log2_step - MIDDLE)) for gain, slope in gains]
        return torch.tensor(levels, dtype=torch.float64, device="cpu")[None, :, None, None]

    def _levels(self, step: int) -> tuple[Tensor, Tensor]:
        """Grey levels of each channel's step (1, L, 1, 1), and the step's normalised logarithm (1, 1, 1, 1)."""
        log2_step = self.gain.new_full((1, 1, 1, 1), step / 2**STEP_FRACTION - MIDDLE)
        return 2.0 ** (step / 2**STEP_FRACTION) / self._gain(log2_step), log2_step

    def _gain(self, log2_step: Tensor) -> Tensor:
        """What multiplies the latents of each channel before they are divided by the step, (N, L, 1, 1)."""
        return torch.exp(self.gain + self.gain_slope * log2_step)

    def _checked_noise(self, x: Tensor, noise: Tensor | None) -> Tensor | None:
        if not self.training:
            return None
        expected = self.noise_shape(len(x), *x.shape[-2:])
        if noise is None or noise.shape != expected:
            raise CodecmillError(
                f"In training the codec needs noise of shape {expected}, but got "
                f"{None if noise is None else tuple(noise.shape)}: draw it uniform on [-0.5, 0.5), or call eval()."
            )
        return noise


def _fixed_log2_step(step: int) -> Tensor:
    """The step's normalised logarithm as an integer of `arithmetic.Exact`, (1, 1, 1, 1)."""
    fixed = (step - MIDDLE * 2**STEP_FRACTION) * 2.0 ** (FRACTION - STEP_FRACTION)
    return torch.full((1, 1, 1, 1), fixed, dtype=torch.float64, device="cpu")


def _entropy_model(config: ModelConfig) -> Factorized | Hyperprior:
    if config.entropy == "factorized":
        return Factorized(config.latent_channels)
    return Hyperprior(config.latent_channels, config.entropy_channels, config.hyper_channels, config.context)
