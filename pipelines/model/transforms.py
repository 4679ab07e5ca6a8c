"""A codec's way from pixels to latents and back: a linear transform of blocks, and networks that add to it.

Everything happens at the resolution of the latents, where matrix units are fed best: 1/8 of the pixels'.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.config import ModelConfig
from pipelines.model.layers import convolution

SLOPE = 0.1
"""Of LeakyReLU below zero."""


class Bottleneck(nn.Module):
    """`x + 1x1(act(3x3(act(1x1(act(x))))))` with half as many channels inside, (N, C, H, W) to the same shape.

    He 2016, arXiv:1512.03385; a third of the arithmetic of two 3x3 convolutions. Starts as the identity.
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = max(1, channels // 2)
        self.first = convolution(channels, inner, 1)
        self.middle = convolution(inner, inner, 3)
        self.last = convolution(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.middle(_act(self.first(_act(x))))
        return x + self.last(_act(inner))


class Analysis(nn.Module):
    """Normalised images (N, 3, H, W) to latents (N, L, H / stride, W / stride) in grey levels."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.stride = 2**config.downsamplings
        pixels = 3 * self.stride**2
        self.shortcut = convolution(pixels, config.latent_channels, 1)
        self.first = convolution(pixels, config.channels, 1)
        self.step = convolution(1, config.channels, 1)
        self.blocks = nn.Sequential(*(Bottleneck(config.channels) for _ in range(config.residual_blocks)))
        self.last = convolution(config.channels, config.latent_channels, 3)

    def forward(self, x: Tensor, log2_step: Tensor) -> Tensor:
        """Images, and the normalised logarithm of the quantiser's step, (N, 1, 1, 1)."""
        blocks = F.pixel_unshuffle(x, self.stride)
        added = self.last(_act(self.blocks(self.first(blocks) + self.step(log2_step))))
        with torch.autocast(
            x.device.type, enabled=False
        ):  # bf16 has too few digits for the transform's low frequencies
            return self.shortcut(blocks) + added.to(x.dtype)


class Synthesis(nn.Module):
    """Latents (N, L, h, w) in grey levels to normalised images (N, 3, h * stride, w * stride)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.stride = 2**config.downsamplings
        pixels = 3 * self.stride**2
        self.shortcut = convolution(config.latent_channels, pixels, 1)
        self.first = convolution(config.latent_channels, config.channels, 3)
        self.step = convolution(1, config.channels, 1)
        self.blocks = nn.Sequential(*(Bottleneck(config.channels) for _ in range(config.residual_blocks)))
        self.last = convolution(config.channels, pixels, 1)

    def forward(self, latents: Tensor, log2_step: Tensor) -> Tensor:
        x = self.first(latents) + self.step(log2_step)
        added = self.last(_act(self.blocks(x)))
        with torch.autocast(latents.device.type, enabled=False):
            return F.pixel_shuffle(self.shortcut(latents) + added.to(latents.dtype), self.stride)


def _act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE)
