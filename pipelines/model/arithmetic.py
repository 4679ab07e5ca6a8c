"""Two arithmetics for one network: floating point to train with, and integers that are the same on every machine.

The networks that decide on the probabilities of symbols, and on pixels where they are asked to be exact, must compute
the same bits where a file is written and where it is read: whatever the processor, the threads, the libraries (Ballé
2019, "Integer networks for data compression with latent-variable models"). Floating-point sums depend on their order.
Here weights and activations are integers, held in float64: as long as every partial sum stays below 2^53 it is exact,
in any order.
"""

from contextlib import suppress
from decimal import Context, Decimal, localcontext
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.errors import CodecmillError

FRACTION = 14
"""Bits after the point of an activation: one unit is 2^-14."""

WEIGHT_FRACTION = 16
"""Bits after the point of a weight."""

LIMIT = 2 ** (FRACTION + 10)
"""Activations are clamped to +-1024."""

COLUMNS = 2**21
"""Numbers that a convolution spreads its input to, at most: a kernel's worth for each place of some of its rows."""

SLOPE_BITS = 3
"""LeakyReLU's slope below zero is 2^-3: a power of two."""

_DIGITS = Context(prec=40)
_LOG_OF_2 = Decimal(2).ln(_DIGITS)


class Arithmetic(Protocol):
    """What a network is written in."""

    def convolve(self, layer: nn.Conv2d, x: Tensor) -> Tensor: ...

    def activate(self, x: Tensor) -> Tensor:
        """LeakyReLU; `x`, which a convolution has just made, may be overwritten."""
        ...


class Floating:
    """Plain torch, for training."""

    def convolve(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        return layer(x)

    def activate(self, x: Tensor) -> Tensor:
        # In place: the backward pass then looks at what came out, which the next convolution keeps anyway. Else a
        # compiled step keeps a mask of bytes beside it, and torch's code for that made steps half as slow again.
        return F.leaky_relu(x, 2.0**-SLOPE_BITS, inplace=True)


FLOATING = Floating()


class Exact:
    """Integers in float64, on the CPU. A tensor holds its values times 2^FRACTION.

    A layer's weights are rounded at their first use, so an object belongs to one state of the weights.
    """

    def __init__(self) -> None:
        self._weights: dict[nn.Conv2d, tuple[Tensor, Tensor]] = {}

    def convolve(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        """(N, C, H, W) integers to (N, C', H', W') integers, clamped to +-LIMIT."""
        if layer not in self._weights:
            self._weights[layer] = _rounded(layer)
        weight, bias = self._weights[layer]
        stride, kernel = layer.stride[0], layer.kernel_size[0]
        if kernel == 1:  # nothing is spread
            return _rescaled(F.conv2d(x, weight, bias, layer.stride, groups=layer.groups))
        x = F.pad(x, 4 * [int(layer.padding[0])])
        height, width = ((length - kernel) // stride + 1 for length in x.shape[-2:])
        result = x.new_empty(len(x), len(weight), height, width)
        most = max(1, COLUMNS // (weight[0].numel() * layer.groups * width))
        for start in range(0, height, most):
            stop = min(start + most, height)
            rows = x[..., start * stride : (stop - 1) * stride + kernel, :]
            # float64 has no other way in torch than im2col and a product: no Winograd, no FFT, no lower precision.
            sums = F.conv2d(rows, weight, bias, layer.stride, groups=layer.groups)
            result[..., start:stop, :] = _rescaled(sums)
        return result

    def activate(self, x: Tensor) -> Tensor:
        return torch.where(x < 0, torch.floor(x * 2.0**-SLOPE_BITS + 0.5), x)


def to_fixed(x: Tensor) -> Tensor:
    """Numbers as the nearest integers of `Exact`, (any shape), float64."""
    return within_limit(torch.round(x.double() * 2.0**FRACTION))


def within_limit(x: Tensor) -> Tensor:
    """Integers of `Exact`, clamped to those that it computes with."""
    return x.clamp(-LIMIT, LIMIT)


def from_fixed(x: Tensor) -> Tensor:
    """The numbers that integers of `Exact` stand for, exactly, float64."""
    return x * 2.0**-FRACTION


def exact_power(log2: float, log: float = 0.0) -> float:
    """`2^log2 e^log`: correctly rounded, where the last bit of the C library's differs between machines.

    Raises:
        CodecmillError: it is not finite.
    """
    with localcontext(_DIGITS), suppress(ArithmeticError):  # too large for a Decimal
        power = float((Decimal(log2) * _LOG_OF_2 + Decimal(log)).exp())
        if isfinite(power):
            return power
    raise CodecmillError("The codec's gains are not finite: its training has diverged. Use an earlier checkpoint.")


def _rescaled(sums: Tensor) -> Tensor:
    """Sums of activations times weights as activations, in place."""
    return sums.mul_(2.0**-WEIGHT_FRACTION).add_(0.5).floor_().clamp_(-LIMIT, LIMIT)


def _rounded(layer: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias as integers.

    Raises:
        CodecmillError: they are so large that a sum could lose its last bit.
    """
    weight = torch.round(layer.weight.detach().double().cpu().contiguous() * 2.0**WEIGHT_FRACTION)
    bias = torch.zeros(len(weight), dtype=torch.float64)
    if layer.bias is not None:
        bias = torch.round(layer.bias.detach().double().cpu() * 2.0 ** (WEIGHT_FRACTION + FRACTION))
    largest = float((weight.abs().flatten(1).sum(dim=1) * LIMIT + bias.abs()).max())
    if not largest < 2.0**53:  # also where a weight is NaN
        raise CodecmillError(
            "The codec's weights are too large for exact integers: its training has diverged. Use an earlier "
            "checkpoint, or train again with a smaller training.learning_rate."
        )
    return weight, bias
