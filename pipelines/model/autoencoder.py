"""The encoder-decoder: normalised images to quantised latents and back.

A stage halves the resolution (on the way back: doubles it), with residual blocks at the smaller one. Beside the stages
runs a linear shortcut between blocks of pixels and latents. Stages are numbered from the pixels on both sides, so that
a model with more residual blocks has all names of a smaller one.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.config import ModelConfig
from pipelines.model.any_image import through
from pipelines.model.checked_input import check_images
from pipelines.model.initial_weights import initialise
from pipelines.model.latent_quantizers import BitLatents, CodebookLatents, DrawnCodes, Quantised
from pipelines.model.layers import convolution, leaky_relu
from pipelines.model.straight_through import (
    FSQ,
    Binarizer,
    ClampedRound,
    Round,
    SignSTE,
    SoftToHardQuantizer,
    UniformNoise,
    UniversalQuantizer,
)

if TYPE_CHECKING:
    from pipelines.data.images import Normalization

SLOPE = 0.1
"""Of LeakyReLU below zero."""


class Reconstruction(NamedTuple):
    """What becomes of images.

    Attributes:
        image: (N, 3, H, W), normalised.
        latents: quantised, (N, L, H / stride, W / stride).
        loss: what the quantiser adds to each sample's, (N,); None of most.
        statistics: zero for each sample, (N,), to be added to its loss, so that codebooks are told; None of most.
    """

    image: Tensor
    latents: Tensor
    loss: Tensor | None = None
    statistics: Tensor | None = None


def _act(x: Tensor) -> Tensor:
    return leaky_relu(x, SLOPE)


class ResidualBlock(nn.Module):
    """`x + conv(act(conv(act(x))))`, (N, C, H, W) to the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = convolution(channels, channels, 3)
        self.last = convolution(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(_act(self.first(_act(x))))


class EncoderStage(nn.Module):
    """(N, C, H, W) to (N, C', H/2, W/2)."""

    def __init__(self, inputs: int, outputs: int, blocks: int, unshuffle: bool):
        super().__init__()
        self.unshuffle = unshuffle
        self.down = convolution(4 * inputs, outputs, 3) if unshuffle else convolution(inputs, outputs, 5, stride=2)
        self.blocks = nn.Sequential(*(ResidualBlock(outputs) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        # On three channels a strided convolution would run at the full resolution for almost no arithmetic.
        return self.blocks(self.down(F.pixel_unshuffle(x, 2) if self.unshuffle else _act(x)))


class DecoderStage(nn.Module):
    """(N, C, H, W) to (N, C', 2H, 2W)."""

    def __init__(self, inputs: int, outputs: int, blocks: int):
        super().__init__()
        self.blocks = nn.Sequential(*(ResidualBlock(inputs) for _ in range(blocks)))
        self.up = convolution(inputs, 4 * outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.up(_act(self.blocks(x))), 2)


class Encoder(nn.Module):
    """(N, 3, H, W) to latents (N, L, H / stride, W / stride), not yet quantised."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        widths = [3, *_widths(config)]
        self.stride = 2**config.downsamplings
        self.stages = nn.ModuleList(
            EncoderStage(widths[i], widths[i + 1], config.residual_blocks, unshuffle=i == 0)
            for i in range(config.downsamplings)
        )
        self.head = convolution(widths[-1], config.latent_channels, 3)
        self.shortcut = convolution(3 * self.stride**2, config.latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        blocks = F.pixel_unshuffle(x, self.stride)
        for stage in self.stages:
            x = stage(x)
        return self.head(x) + self.shortcut(blocks)


class Decoder(nn.Module):
    """Latents (N, L, h, w) to (N, 3, h * stride, w * stride)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        widths = [3, *_widths(config)]
        self.stride = 2**config.downsamplings
        self.head = convolution(config.latent_channels, widths[-1], 3)
        self.stages = nn.ModuleList(
            DecoderStage(widths[i + 1], widths[i], config.residual_blocks) for i in range(config.downsamplings)
        )
        self.shortcut = convolution(config.latent_channels, 3 * self.stride**2, 1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.head(latents)
        for stage in reversed(self.stages):
            x = stage(x)
        return x + F.pixel_shuffle(self.shortcut(latents), self.stride)


def _widths(config: ModelConfig) -> list[int]:
    """Channels after each encoder stage: half in the first, where a channel costs most."""
    return [max(1, config.channels // 2)] + [config.channels] * (config.downsamplings - 1)


def _quantizer(config: ModelConfig, seed: int) -> nn.Module:
    match config.quantizer:
        case "round":
            return Round()
        case "clamped_round":
            return ClampedRound(config.levels)
        case "sign":
            return SignSTE()
        case "soft_to_hard":
            return SoftToHardQuantizer(config.levels, config.sigma)
        case "noise":
            return UniformNoise()
        case "universal":
            return UniversalQuantizer()
        case "binarizer":
            return Binarizer()
        case "fsq":
            return FSQ([config.levels] * config.latent_channels)
        case "vq":
            return CodebookLatents(config, seed)
        case "lfq":
            return BitLatents()
        case "gumbel":
            return DrawnCodes(config, seed)


class Autoencoder(nn.Module):
    """`Encoder -> straight-through quantiser -> Decoder`; the same config and seed give the same weights.

    On every processor with AVX2 or AVX-512, that is: without them torch draws other random numbers.

    Args:
        config: sizes and quantiser.
        seed: of the initial weights; the global generator is neither read nor advanced.

    Attributes:
        stride: pixels a latent, in each direction; H and W must be multiples of it.
        parts: of a bit stream, none.
        encoding: how the names of parameters begin that decide on the latents.
        units: types of its parts that are called once, and whose weights can be elsewhere until then.
    """

    units = (ResidualBlock, EncoderStage, DecoderStage)
    parts: tuple[str, ...] = ()
    encoding = ("encoder.",)

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.stride = 2**config.downsamplings
        self.encoder = Encoder(config)
        self.quantizer = _quantizer(config, seed)
        self.decoder = Decoder(config)
        initialise(self, SLOPE, seed)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Reconstruction:
        """Encode, quantise and decode.

        Args:
            x: normalised images (N, 3, H, W), floating point.
            noise: of `noise_shape(N, H, W)`, uniform on [-0.5, 0.5), where that is not None and the model is training.

        Raises:
            InputError: x has another shape or type; the message says what to do.
            CodecmillError: the noise is missing or has another shape.
        """
        check_images(x, self.stride, self.decoder.head.weight.dtype)
        latents = self.encoder(x)
        found = self.quantizer(latents, noise) if self._takes_noise else self.quantizer(latents)
        quantised = found if isinstance(found, Quantised) else Quantised(found)
        return Reconstruction(self.decoder(quantised.values), *quantised)

    @property
    def _takes_noise(self) -> bool:
        return isinstance(self.quantizer, (UniformNoise, UniversalQuantizer, Binarizer, DrawnCodes))

    def noise_shape(self, n: int, h: int, w: int) -> tuple[int, int, int, int] | None:
        """The shape of the noise that training on n images of h x w pixels takes, or None where it takes none."""
        if not self._takes_noise:
            return None
        channels = self.config.latent_channels
        if isinstance(self.quantizer, DrawnCodes):
            channels = self.quantizer.noise_channels(channels)
        return n, channels, h // self.stride, w // self.stride

    @torch.no_grad()
    def reconstruct(self, image: Tensor, normalization: "Normalization | None" = None) -> Tensor:
        """What becomes of an image of any size: padded at the right and bottom to the stride, coded, cropped back.

        Quantises as in evaluation, whatever mode the model is in.

        Args:
            image: (3, H, W) or (N, 3, H, W); uint8, or floating point on the scale 0 to 1.
            normalization: what the model was trained with; by default the model sees the scale 0 to 1.

        Returns:
            Floating point on the scale 0 to 1, not clamped, of the shape of `image`, on the model's device.

        Raises:
            InputError: the image has another shape or type.
        """
        return through(self._evaluated, image, normalization, self.stride, self.decoder.head.weight)

    def _evaluated(self, x: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to such, quantised as in evaluation."""
        latents = self.encoder(x)
        was_training = self.quantizer.training
        quantised = self.quantizer.eval()(latents)
        self.quantizer.train(was_training)
        return self.decoder(quantised.values if isinstance(quantised, Quantised) else quantised)
