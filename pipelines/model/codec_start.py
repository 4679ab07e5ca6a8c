"""What a codec starts from: a linear transform of blocks whose coefficients have known scales.

The networks add nothing to it: the first step of training is already a transform codec, with scales that fit.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipelines.data.images import Normalization
from pipelines.model.arithmetic import SLOPE_BITS
from pipelines.model.codec import MIDDLE, TransformCodec
from pipelines.model.entropy.factorized import Factorized
from pipelines.model.initial_weights import cosine_basis, draw

_SILENT = {"last", "neighbours"}
"""Convolutions that add something to what is there already: nothing, at first."""

ENCODER_UNIT, DECODER_UNIT = 1.0, 1 / 32
"""Of the learned part of each transform: grey levels for a normalised pixel, and normalised pixels for a coefficient at
its deviation. A step of the optimiser then moves either by a few hundredths of a grey level."""


class Coefficients(NamedTuple):
    """An orthonormal transform of RGB blocks, the coefficients of the largest deviation first.

    Attributes:
        rows: (count, 3 * size^2), their columns in the order of pixel_unshuffle.
        deviation: of each coefficient over photographs, in grey levels, (count,).
    """

    rows: Tensor
    deviation: Tensor


def start_from_cosines(model: TransformCodec, seed: int) -> None:
    """All weights: the cosine transform (Ahmed 1974) of images normalised with a standard deviation of 0.25."""
    rows, spread = cosine_basis(model.stride, model.config.latent_channels)
    half = Normalization(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    start_from(model, Coefficients(rows, spread * 64), half, seed)


def start_from(model: TransformCodec, transform: Coefficients, normalization: Normalization, seed: int) -> None:
    """All weights, from a transform of at most as many coefficients as the model has latents.

    Args:
        normalization: of the images that the model is going to get.
        seed: the global generator is neither read nor advanced.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # every convolution here has one
            if _SILENT & set(name.split(".")):
                nn.init.zeros_(module.weight)
            else:
                draw(module.weight, math.sqrt(2 / (1 + 2.0 ** (-2 * SLOPE_BITS))), seed, name)
    count = len(transform.rows)
    deviation = torch.ones(model.config.latent_channels)
    deviation[:count] = transform.deviation.clamp_min(0.1)
    levels = 255 * torch.tensor(normalization.std).repeat_interleave(model.stride**2)
    with torch.no_grad():
        for part in (model.encoder.transform, model.decoder.transform):
            part.given.zero_()
            part.learned.zero_()
        model.encoder.transform.given[:count, :, 0, 0] = transform.rows * levels
        model.decoder.transform.given[:, :count, 0, 0] = (transform.rows / levels).T
        model.encoder.transform.unit.fill_(ENCODER_UNIT)
        model.decoder.transform.unit.copy_((DECODER_UNIT / (1 + deviation))[:, None, None])
        model.gain.zero_()
        model.gain_slope.zero_()
        # Coefficients differ by orders of magnitude: the networks are to see all of them alike.
        in_steps = (1 + deviation / 2**MIDDLE)[:, None, None]
        for network in (model.encoder.network, model.decoder.network):
            network.first.weight /= in_steps
        _start_entropy_model(model, deviation)
        if not isinstance(model.entropy, Factorized):
            for context in model.entropy.contexts.parameters():
                if context.dim() > 1:  # its weight, not its bias
                    context /= in_steps


def _start_entropy_model(model: TransformCodec, deviation: Tensor) -> None:
    """Scales of Laplace variables of these deviations, which are in grey levels, over the quantiser's step."""
    entropy = model.entropy
    base = entropy if isinstance(entropy, Factorized) else entropy.base
    base.mean.zero_()
    base.scale.copy_((torch.log2(deviation / math.sqrt(2)) - MIDDLE)[:, None, None])
    base.slope.fill_(-1)
