"""A mean-scale hyperprior with a context in passes: what a file says first predicts what comes next.

Ballé 2018 (arXiv:1802.01436) and Minnen 2018 (arXiv:1809.02736): a few hyper-latents tell mean and scale of all
latents. He 2021 (arXiv:2103.15306): the latents on the black squares of a checkerboard, the anchors, are coded first,
and those on the white squares with their neighbours known. Anchors take three quarters of the bits: so their odd rows
wait for the even ones, and the grid of these is treated alike. A pass goes over the whole picture at once.
"""

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.model.arithmetic import FLOATING, Arithmetic, Exact, from_fixed, within_limit
from pipelines.model.entropy.coding import SymbolCoder
from pipelines.model.entropy.factorized import Factorized, code_around, quantise
from pipelines.model.layers import Unfilled, convolution

HYPER_STRIDE = 4
"""Latents a hyper-latent, in each direction."""

LOW = 24
"""Channels, those of the lowest frequencies, whose means also follow their neighbours' values in a straight line."""


class Pass(NamedTuple):
    """Where latents are coded at a time: on every `step`-th row and column from `first` on.

    Attributes:
        colour: of a checkerboard on these rows and columns, 0 black and 1 white; None for all.
    """

    first: int
    step: int
    colour: int | None = None

    @property
    def grid(self) -> int:
        """Rows and columns from one known latent to the next, as far as the context of this pass reaches for them."""
        return self.first or self.step

    @property
    def is_diagonal(self) -> bool:
        """Whether the next known latents are at the corners of each place, else at its sides."""
        return self.first > 0

    def of(self, x: Tensor) -> Tensor:
        """The rows and columns, (N, C, h, w) to (N, C, h', w')."""
        return x[..., self.first :: self.step, self.first :: self.step]

    def put(self, values: Tensor, into: Tensor) -> Tensor:
        """`into`, (N, C, h, w), with values (N, C, h', w') at the places of this pass."""
        found = into.clone()
        self.of(found).copy_(torch.where(self.mask(values), values, self.of(into)))
        return found

    def mask(self, x: Tensor) -> Tensor:
        """Which of (N, C, h', w') are places of this pass: bool (1, 1, h', w')."""
        rows, columns = (torch.arange(length, device=x.device) for length in x.shape[-2:])
        if self.colour is None:
            return torch.ones(1, 1, len(rows), len(columns), dtype=torch.bool, device=x.device)
        return ((rows[:, None] + columns) % 2 == self.colour)[None, None]


PASSES = {
    "checkerboard": (Pass(0, 1, colour=0), Pass(0, 1, colour=1)),
    "nested": (Pass(0, 4), Pass(2, 4), Pass(0, 2, colour=1), Pass(1, 2), Pass(0, 1, colour=1)),
}
"""Each place has one pass; from the second on, the nearest neighbours on both sides are known."""


class Prior(NamedTuple):
    """Mean and log2 scale of latents, (N, L, h, w) each."""

    mean: Tensor
    scale: Tensor


class Hyperprior(nn.Module):
    """Means and scales of latents (N, L, h, w) in steps.

    Starts as the `Factorized` model that it holds: what the networks add to it is zero at first.

    Args:
        channels: L.
        width: channels of the networks.
        hyper_channels: of the hyper-latents.
        context: which of `PASSES`.
    """

    parts = ("latents", "hyper")

    def __init__(self, channels: int, width: int, hyper_channels: int, context: str):
        super().__init__()
        self.base = Factorized(channels)
        self.hyper = Factorized(hyper_channels)
        self.hyper_channels = hyper_channels
        self.analysis = nn.ModuleList(
            [
                convolution(channels, width, 3),
                convolution(width, width, 5, 2),
                convolution(width, hyper_channels, 5, 2),
            ]
        )
        self.coarse = convolution(hyper_channels, 4 * width, 3)
        self.fine = convolution(width, 4 * width, 3)
        self.features = convolution(width, width, 3)
        self.step = convolution(1, width, 1)
        self.passes = PASSES[context]
        later = self.passes[1:]
        self.contexts = nn.ModuleList(_context(channels, width, each) for each in later)
        self.low = min(channels, LOW)
        self.neighbours = nn.ModuleList(_context(self.low, self.low, each, groups=self.low) for each in later)
        self.heads = nn.ModuleList(
            _Head(width if i == 0 else 2 * width, width, channels) for i in range(len(self.passes))
        )

    def forward(
        self, y: Tensor, log2_step: Tensor, noise: Tensor | None, hard: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Quantised latents and bits.

        Args:
            y: (N, L, h, w) in steps.
            log2_step: (N, 1, 1, 1).
            noise: (N, n), uniform on [-0.5, 0.5), with `noise_size(h, w)` numbers a picture; None in evaluation.
            hard: see `quantise`.

        Returns:
            Quantised latents (N, L, h, w), and the bits of latents and hyper-latents, (N, 2).
        """
        z = self._hyper_latents(y)
        for_y = for_z = None
        if noise is not None:
            for_y, for_z = noise[:, : y[0].numel()].view_as(y), noise[:, y[0].numel() :].view_as(z)
        mean_z, scale_z = self.hyper.prior(log2_step)
        hyper_quantised, hyper_cost = quantise(z, mean_z, scale_z, for_z, hard)
        features = self._features(FLOATING, hyper_quantised, log2_step, y.shape[-2:])
        base = Prior(*self.base.prior(log2_step))
        known = torch.zeros_like(y)
        mean, scale = known, known
        for number, each in self._used(y.shape[-2:]):
            prior = self._prior(number, FLOATING, features, known, base)
            mean, scale = each.put(prior.mean, mean), each.put(prior.scale, scale)
            if number < len(self.passes) - 1:
                known = each.put(quantise(each.of(y), prior.mean, prior.scale, None)[0], known)
        quantised, cost = quantise(y, mean, scale, for_y, hard)
        return quantised, torch.stack([each.sum(dim=(1, 2, 3)) for each in (cost, hyper_cost)], dim=1)

    def noise_size(self, h: int, w: int) -> int:
        """Random numbers that training takes for a picture of h x w latents."""
        hyper_h, hyper_w = hyper_size((h, w))
        return self.base.mean.shape[0] * h * w + self.hyper_channels * hyper_h * hyper_w

    def code(self, coder: SymbolCoder, y: Tensor | None, size: tuple[int, int], log2_step: Tensor) -> Tensor:
        """Write or read a picture's latents; as `Factorized.code`."""
        # What is written may be decided where the weights are; what both sides compute, they compute on the CPU.
        z = None if y is None else self._hyper_latents(y.to(self.coarse.weight.device)).cpu()
        exact = Exact()
        hyper_quantised = within_limit(code_around(coder, z, *self.hyper.exact_prior(log2_step, hyper_size(size))))
        features = self._features(exact, hyper_quantised, log2_step, size)
        base = Prior(*self.base.exact_prior(log2_step, (1, 1)))
        latents = base.mean.new_zeros(1, base.mean.shape[1], *size)
        for number, each in self._used(size):
            prior = self._prior(number, exact, features, within_limit(latents), base)
            here = each.mask(prior.mean)
            latents = each.put(_code_where(here, coder, None if y is None else each.of(y), prior), latents)
        return from_fixed(latents)

    def _hyper_latents(self, y: Tensor) -> Tensor:
        # Coefficients of block transforms spread over orders of magnitude.
        first, *others = self.analysis
        x = first(torch.asinh(y))
        for layer in others:
            x = layer(FLOATING.activate(x))
        return x.float() if x.dtype != torch.float64 else x

    def _features(
        self, arithmetic: Arithmetic, z: Tensor, log2_step: Tensor, size: torch.Size | tuple[int, int]
    ) -> Tensor:
        """Hyper-latents to features (N, width, h, w), which all heads share: nothing may change them in place."""
        x = F.pixel_shuffle(arithmetic.convolve(self.coarse, z), 2)
        x = F.pixel_shuffle(arithmetic.convolve(self.fine, arithmetic.activate(x)), 2)
        x = x[..., : size[0], : size[1]]
        x = arithmetic.convolve(self.features, arithmetic.activate(x)) + arithmetic.convolve(self.step, log2_step)
        return arithmetic.activate(x)

    def _used(self, size: torch.Size | tuple[int, int]) -> list[tuple[int, Pass]]:
        """The passes that have a place in h x w latents: a single row has no second one."""
        return [(number, each) for number, each in enumerate(self.passes) if each.first < min(size)]

    def _prior(self, number: int, arithmetic: Arithmetic, features: Tensor, known: Tensor, base: Prior) -> Prior:
        """Of a pass, from the features and the latents of all passes before it, zero elsewhere."""
        this = self.passes[number]
        here = this.of(features)
        if number == 0:
            mean, scale = self.heads[0](arithmetic, here)
            return Prior(base.mean + mean, base.scale + scale)
        known = known[..., :: this.grid, :: this.grid]
        if this.is_diagonal:
            known = F.pad(known, (1, 2, 1, 2))  # the first of the kernel's places is then about the second latent
        context, neighbours = (cast("nn.Conv2d", each[number - 1]) for each in (self.contexts, self.neighbours))
        around = arithmetic.activate(arithmetic.convolve(context, known))
        mean, scale = self.heads[number](arithmetic, torch.cat([here, around], dim=1))
        with torch.autocast(known.device.type, enabled=False):  # the lowest frequencies have too many digits for bf16
            low = arithmetic.convolve(neighbours, known[:, : self.low])
            mean = mean.to(known.dtype) + F.pad(low, (0, 0, 0, 0, 0, mean.shape[1] - self.low))
        return Prior(base.mean + mean, base.scale + scale)


def _context(inputs: int, outputs: int, place: Pass, groups: int = 1) -> nn.Conv2d:
    """What sees the known latents about the places of a pass."""
    if not place.is_diagonal:
        return convolution(inputs, outputs, 5, groups=groups)
    return Unfilled(inputs, outputs, 5, stride=2, groups=groups)


class _Head(nn.Module):
    """Features to what is added to mean and log2 scale; zero at first."""

    def __init__(self, inputs: int, width: int, channels: int):
        super().__init__()
        self.first = convolution(inputs, width, 1)
        self.last = convolution(width, 2 * channels, 1)

    def forward(self, arithmetic: Arithmetic, x: Tensor) -> tuple[Tensor, Tensor]:
        x = arithmetic.convolve(self.last, arithmetic.activate(arithmetic.convolve(self.first, x)))
        mean, scale = x.chunk(2, dim=1)
        return mean, scale


def _code_where(mask: Tensor, coder: SymbolCoder, y: Tensor | None, prior: Prior) -> Tensor:
    """Write or read the latents at some places; returns them as integers of `Exact`, zero elsewhere."""
    here = mask.expand_as(prior.mean)
    part = code_around(coder, None if y is None else y[here], prior.mean[here], prior.scale[here])
    return torch.zeros_like(prior.mean).masked_scatter(here, part)


def hyper_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the hyper-latents of h x w latents."""
    return -(-size[0] // HYPER_STRIDE), -(-size[1] // HYPER_STRIDE)
