"""Quantisers of latents that are vectors or come with a loss of their own: codebooks, bits and draws among codes."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipelines.config import ModelConfig
from pipelines.model.straight_through import LFQ, GumbelSoftmaxST, VectorQuantizer
from pipelines.model.straight_through.vector import nearest_code, normal_vectors

RESTART = 0.03
"""A code that is chosen less than this share of the mean is given up."""


class Quantised(NamedTuple):
    """Latents after the quantiser.

    Attributes:
        values: (N, L, h, w).
        loss: what it adds to each sample's, (N,), if anything, with a weight that is the user's choice.
        statistics: zero for each sample, (N,), to be added without a weight: see `VectorQuantized`; None of most.
    """

    values: Tensor
    loss: Tensor | None = None
    statistics: Tensor | None = None


class CodebookLatents(nn.Module):
    """Latents as vectors of `code_channels` neighbouring channels, each replaced by the nearest of one codebook."""

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        self.codes = VectorQuantizer(
            config.codes,
            config.code_channels,
            rotation=config.rotation_trick,
            decay=config.codebook_decay,
            restart=RESTART,
            seed=seed,
        )

    def forward(self, latents: Tensor) -> Quantised:
        vectors = _as_vectors(latents, self.codes.codebook.shape[1])
        found = self.codes(vectors)
        return Quantised(_as_latents(found.values, latents), found.loss, found.statistics)


class DrawnCodes(nn.Module):
    """Vectors replaced by codes that are drawn, the nearer the likelier; in evaluation the nearest is taken.

    The scores are `-|v - c|^2`; the codes learn through the softmax (Jang 2017, arXiv:1611.01144).
    """

    def __init__(self, config: ModelConfig, seed: int):
        super().__init__()
        self.codebook = nn.Parameter(normal_vectors(config.codes, config.code_channels, seed))
        self.choice = GumbelSoftmaxST(config.temperature)

    def forward(self, latents: Tensor, noise: Tensor | None = None) -> Quantised:
        """Noise, uniform on [-0.5, 0.5), (N, L / D * K, h, w), is needed in training."""
        codes, size = self.codebook.shape
        with torch.autocast(latents.device.type, enabled=False):
            codebook = self.codebook
            vectors = _as_vectors(latents.to(codebook.dtype), size).movedim(1, -1)
            if not self.training:  # without the scores of all codes, which of a large picture are gigabytes
                with torch.no_grad():
                    nearest = nearest_code(vectors.reshape(-1, size), codebook).view(vectors.shape[:-1])
                values = torch.where(vectors.isfinite(), codebook[nearest], vectors).movedim(-1, 1)
                return Quantised(_as_latents(values, latents))
            scores = 2 * vectors @ codebook.T - codebook.square().sum(dim=1)
            uniform = None if noise is None else _as_vectors(noise, codes).movedim(1, -1) + 0.5
            values = (self.choice(scores, uniform) @ codebook).movedim(-1, 1)
        return Quantised(_as_latents(values, latents))

    def noise_channels(self, channels: int) -> int:
        """Of the noise for latents of so many channels."""
        codes, size = self.codebook.shape
        return channels // size * codes


class BitLatents(nn.Module):
    """Each latent as a bit, with the loss that keeps all codes in use."""

    def __init__(self) -> None:
        super().__init__()
        self.bits = LFQ()

    def forward(self, latents: Tensor) -> Quantised:
        found = self.bits(latents)
        return Quantised(found.values, found.loss)


def _as_vectors(latents: Tensor, size: int) -> Tensor:
    """(N, L, h, w) to (N, size, L / size, h, w)."""
    n, channels, h, w = latents.shape
    return latents.reshape(n, channels // size, size, h, w).movedim(2, 1)


def _as_latents(vectors: Tensor, like: Tensor) -> Tensor:
    """The way back."""
    return vectors.movedim(1, 2).reshape(like.shape)
