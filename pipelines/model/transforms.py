"""A codec's way from pixels to latents and back: a linear transform of blocks, and networks that add to it.

Everything happens at the resolution of the latents, where matrix units are fed best: 1/8 of the pixels'.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.config import ModelConfig
from pipelines.errors import CodecmillError
from pipelines.model.arithmetic import FLOATING, Arithmetic, Exact, exact_power, from_fixed, to_fixed
from pipelines.model.layers import convolution

COEFFICIENT_FRACTION, BASIS_FRACTION = 6, 24
"""Bits after the point of a coefficient in grey levels, and of a transform's weight, where pixels are exact."""

ADDED = 0.1
"""What one unit of the decoder's network is in normalised pixels, at the middle step: some 6 to 12 grey levels."""


class Bottleneck(nn.Module):
    """`x + 1x1(act(3x3(act(1x1(x)))))` with half as many channels inside, (N, C, H, W) to the same shape.

    He 2016, arXiv:1512.03385; a third of the arithmetic of two 3x3 convolutions. Starts as the identity.
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = max(1, channels // 2)
        self.first = convolution(channels, inner, 1)
        self.middle = convolution(inner, inner, 3)
        self.last = convolution(inner, channels, 1)

    def forward(self, x: Tensor, arithmetic: Arithmetic = FLOATING) -> Tensor:
        inner = arithmetic.activate(arithmetic.convolve(self.first, x))
        inner = arithmetic.activate(arithmetic.convolve(self.middle, inner))
        return x + arithmetic.convolve(self.last, inner)


class Network(nn.Module):
    """What is learned beside a transform: bottlenecks between two convolutions, told the quantiser's step."""

    def __init__(self, inputs: int, outputs: int, config: ModelConfig):
        super().__init__()
        self.first = convolution(inputs, config.channels, 3)
        self.step = convolution(1, config.channels, 1)
        self.blocks = nn.ModuleList(Bottleneck(config.channels) for _ in range(config.residual_blocks))
        self.last = convolution(config.channels, outputs, 1)

    @property
    def reach(self) -> int:
        """How many latents away, at most, what it sees lies."""
        return sum(part.kernel_size[0] // 2 for part in self.modules() if isinstance(part, nn.Conv2d))

    def forward(self, x: Tensor, log2_step: Tensor, arithmetic: Arithmetic = FLOATING) -> Tensor:
        """(N, inputs, h, w) and (N, 1, 1, 1) to (N, outputs, h, w) of the type of `x`."""
        inner = arithmetic.convolve(self.first, x) + arithmetic.convolve(self.step, log2_step)
        inner = arithmetic.activate(inner)
        for block in self.blocks:
            inner = block(inner, arithmetic)
        return arithmetic.convolve(self.last, inner).to(x.dtype)


class BlockTransform(nn.Module):
    """A linear transform of blocks: one that is given, and what is learned of it, which starts at zero.

    The lowest frequencies are thousands of grey levels, the highest one: for an optimiser whose steps are all of one
    size, what is learned is counted in a `unit` of each input. Computed in the type of its input, for bf16 has too few
    digits.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.register_buffer("given", torch.zeros(outputs, inputs, 1, 1))
        self.register_buffer("unit", torch.ones(1, inputs, 1, 1))
        self.learned = nn.Parameter(torch.zeros(outputs, inputs, 1, 1))

    given: Tensor
    unit: Tensor

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, self.weight)

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs, 1, 1)."""
        return self.given + self.unit * self.learned

    def exact(self, x: Tensor) -> Tensor:
        """As forward, of coefficients in grey levels, float64: the same bits on every machine.

        Raises:
            CodecmillError: weights and coefficients are so large that a sum could lose its last bit.
        """
        weight = torch.round(self.weight.detach().double().cpu() * 2.0**BASIS_FRACTION)
        coefficients = torch.round(x * 2.0**COEFFICIENT_FRACTION)
        largest = float(weight.abs().sum(dim=1).max()) * float(coefficients.abs().max())
        if not largest < 2.0**53:
            raise CodecmillError("The picture's coefficients are too large for exact pixels: the file is damaged.")
        return F.conv2d(coefficients, weight) * 2.0 ** -(BASIS_FRACTION + COEFFICIENT_FRACTION)


class Analysis(nn.Module):
    """Normalised images (N, 3, H, W) to latents (N, L, H / stride, W / stride) in steps."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.stride = 2**config.downsamplings
        self.transform = BlockTransform(3 * self.stride**2, config.latent_channels)
        self.network = Network(config.latent_channels, config.latent_channels, config)

    def forward(self, x: Tensor, levels: Tensor, log2_step: Tensor) -> Tensor:
        """Images, grey levels a step (N, L, 1, 1), and the step's normalised logarithm (N, 1, 1, 1)."""
        y = self.transform(F.pixel_unshuffle(x, self.stride)) / levels
        return y + self.network(y, log2_step)


class Synthesis(nn.Module):
    """Latents (N, L, h, w) in steps to normalised images (N, 3, h * stride, w * stride)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.stride = 2**config.downsamplings
        self.transform = BlockTransform(config.latent_channels, 3 * self.stride**2)
        self.network = Network(config.latent_channels, 3 * self.stride**2, config)

    def forward(self, latents: Tensor, levels: Tensor, log2_step: Tensor) -> Tensor:
        """As `Analysis.forward`. What the network adds is as large as the quantiser's errors are."""
        added = self.network(latents, log2_step) * (torch.exp2(log2_step) * ADDED)
        return F.pixel_shuffle(self.transform(latents * levels) + added, self.stride)

    def exact(self, latents: Tensor, levels: Tensor, log2_step: float) -> Tensor:
        """As forward, on the CPU in integers: the same bits on every machine.

        Args:
            latents: (1, L, h, w) float64, in steps.
            levels: (1, L, 1, 1) float64.
            log2_step: the step's normalised logarithm.
        """
        step = to_fixed(latents.new_full((1, 1, 1, 1), log2_step))
        added = from_fixed(self.network(to_fixed(latents), step, Exact())) * (exact_power(log2_step) * ADDED)
        return F.pixel_shuffle(self.transform.exact(latents * levels) + added, self.stride)
