"""A factorised entropy model: each channel has a mean and a scale, alike everywhere in all pictures."""

import torch
from torch import Tensor, nn

from pipelines.errors import CodecmillError
from pipelines.model.arithmetic import FRACTION, from_fixed, to_fixed
from pipelines.model.entropy import laplace
from pipelines.model.entropy.coding import SymbolCoder
from pipelines.model.straight_through import round_ste


class Factorized(nn.Module):
    """Laplace latents whose scale depends on their channel and on the quantiser's step (after Ballé 2017).

    `log2 b = scale + slope * s` and `mean` are learned, one number a channel each; s is the logarithm of the step.
    (arXiv:1611.01704 has piecewise linear densities; one family for all needs one set of tables for all.)
    """

    parts = ("latents",)

    def __init__(self, channels: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(channels, 1, 1))
        self.scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.slope = nn.Parameter(torch.zeros(channels, 1, 1))

    def prior(self, log2_step: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log2 scale, (C, 1, 1) and (N, C, 1, 1), for steps (N, 1, 1, 1)."""
        return self.mean, self.scale + self.slope * log2_step

    def forward(
        self, y: Tensor, log2_step: Tensor, noise: Tensor | None, hard: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Latents (N, C, h, w) in steps to quantised ones and to bits (N, 1); see `quantise`.

        Args:
            noise: (N, n), uniform on [-0.5, 0.5), with `noise_size(h, w)` numbers a picture; None in evaluation.
        """
        mean, scale = self.prior(log2_step)
        quantised, cost = quantise(y, mean, scale, None if noise is None else noise.view_as(y), hard)
        return quantised, cost.sum(dim=(1, 2, 3))[:, None]

    def noise_size(self, h: int, w: int) -> int:
        """Random numbers that training takes for a picture of h x w latents."""
        return len(self.mean) * h * w

    def exact_prior(self, log2_step: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Mean and log2 scale of a picture as integers of `Exact`, (1, C, h, w) each.

        Args:
            log2_step: such an integer, (1, 1, 1, 1).
            size: h and w.
        """
        slope = to_fixed(self.slope.detach().cpu())
        scale = to_fixed(self.scale.detach().cpu()) + torch.floor(slope * log2_step * 2.0**-FRACTION + 0.5)
        mean = to_fixed(self.mean.detach().cpu())
        return mean.expand(1, -1, *size), scale.expand(1, -1, *size)

    def code(self, coder: SymbolCoder, y: Tensor | None, size: tuple[int, int], log2_step: Tensor) -> Tensor:
        """Write or read a picture's latents; returns the quantised ones, (1, C, h, w) float64.

        Args:
            y: (1, C, h, w) in steps; None to read.
            size: h and w.
            log2_step: as an integer of `Exact`, (1, 1, 1, 1).
        """
        mean, scale = self.exact_prior(log2_step, size)
        return from_fixed(code_around(coder, y, mean, scale))


def quantise(
    y: Tensor, mean: Tensor, log2_scale: Tensor, noise: Tensor | None, hard: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Latents rounded about their means, and the bits of each, both of the shape of `y`.

    In training the bits are those of noisy latents, the values those of rounded ones whose gradient goes straight
    through (Minnen and Singh 2020, arXiv:2007.08739); without noise both are of the rounded ones.

    Args:
        y, noise: (N, C, h, w); noise uniform on [-0.5, 0.5).
        mean, log2_scale: of shapes that broadcast to it.
        hard: of no dimension, whether the bits in training are those of rounded latents after all; None for no.
    """
    residual = y - mean
    rounded = round_ste(residual)
    if noise is None:
        return rounded + mean, laplace.bits(rounded, log2_scale).clamp_max(laplace.MOST_BITS)
    if hard is not None:
        noise = torch.where(hard, (rounded - residual).detach(), noise)
    return rounded + mean, laplace.bits(residual + noise, log2_scale)


def code_around(coder: SymbolCoder, y: Tensor | None, mean: Tensor, log2_scale: Tensor) -> Tensor:
    """Write or read latents about their means; returns them as integers of `Exact`, but not within its limit.

    A lowest frequency of large blocks may be more steps than that: `within_limit` is for what is computed from it.

    Args:
        y: in steps, floating point; None to read.
        mean, log2_scale: integers of `Exact`, of the shape of `y`.

    Raises:
        CodecmillError: one of them is not finite.
    """
    if not all(each is None or each.isfinite().all() for each in (y, mean, log2_scale)):
        raise CodecmillError(
            "The codec's latents or their probabilities are not finite: its training has diverged. Use an earlier "
            "checkpoint."
        )
    spacing = 2.0**FRACTION / laplace.PER_OCTAVE
    rows = torch.floor((log2_scale - laplace.LOWEST * 2.0**FRACTION) / spacing + 0.5)
    rows = rows.clamp(0, laplace.SCALES - 1).long()
    symbols = None if y is None else torch.round(y.double() - from_fixed(mean)).long()
    return coder.code(rows, symbols).double() * 2.0**FRACTION + mean
