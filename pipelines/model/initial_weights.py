"""What an autoencoder starts from: a cosine transform of its blocks (Ahmed 1974), to which its stages add nothing.

So training begins at a usable codec and only ever has to improve on it. Every tensor is drawn from a generator of its
own name: a model with more residual blocks has the same weights where a smaller one has any. A residual block starts as
the identity: one that is added to a trained model leaves what the model computes as it was.
"""

import hashlib
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipelines.config import ModelConfig

if TYPE_CHECKING:
    from pipelines.model.autoencoder import Autoencoder


def initialise(model: "Autoencoder", slope: float, seed: int) -> None:
    """Fill all weights: the shortcuts with the transform, what the stages add with zero, the rest at random.

    Args:
        slope: of the LeakyReLU before each convolution, below zero.
        seed: the global generator is neither read nor advanced.
    """
    if next(model.parameters()).is_meta:
        return  # only its shapes are wanted
    gain = math.sqrt(2 / (1 + slope**2))  # a convolution after LeakyReLU then keeps the variance
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # every convolution here has one
            if name.endswith(".last") or name in ("encoder.head", "decoder.stages.0.up"):
                nn.init.zeros_(module.weight)
            else:
                draw(module.weight, gain, seed, name)
    basis, spread = cosine_basis(model.stride, model.config.latent_channels)
    encoder_gain, decoder_gain = _latent_gains(model.config, spread)
    used = len(spread)
    with torch.no_grad():
        # Latents beyond the transform's size keep their random inputs, and are silent until the decoder finds a use.
        model.encoder.shortcut.weight[:used] = (basis * encoder_gain[:, None])[:, :, None, None]
        model.decoder.shortcut.weight.zero_()
        model.decoder.shortcut.weight[:, :used] = (basis * decoder_gain[:, None]).T[:, :, None, None]
        model.decoder.head.weight[:, :used] /= (encoder_gain * spread)[:, None, None]


def draw(weight: Tensor, gain: float, seed: int, name: str) -> None:
    """Normal weights that multiply the variance of their input by gain^2, from a generator of the tensor's own."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    fan_in = weight[0].numel()
    # On the CPU and in float32, whatever the defaults are, so that the same seed gives the same weights.
    normal = torch.randn(weight.shape, generator=generator, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        weight.copy_(normal * (gain / math.sqrt(fan_in)))


def cosine_basis(size: int, count: int) -> tuple[Tensor, Tensor]:
    """The rows of the orthonormal cosine transform of RGB blocks that hold most of a photograph.

    Returns:
        The rows (at most `count`, 3 * size^2), their columns in the order of pixel_unshuffle; and the standard
        deviation, falling, that each coefficient is expected to have on normalised photographs.
    """
    k = torch.arange(size, dtype=torch.float64)
    # Measured on scikit-image's photographs, 8x8 blocks: grey falls like 1 / (u + v), colours are 4 and 12 times less.
    falling = 1 / (7 * (k[:, None] + k)).clamp(min=1)
    spread = size * math.sqrt(3) * torch.tensor([1, 1 / 4, 1 / 12], dtype=torch.float64)[:, None, None] * falling
    order = spread.flatten().argsort(descending=True, stable=True)[:count]
    hue, vertical, horizontal = order // size**2, order // size % size, order % size
    colour = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    colour /= colour.norm(dim=1, keepdim=True)
    cosine = torch.cos(math.pi * (2 * k + 1) * k[:, None] / (2 * size)) * math.sqrt(2 / size)
    cosine[0] /= math.sqrt(2)
    rows = torch.einsum("kc,ky,kx->kcyx", colour[hue], cosine[vertical], cosine[horizontal])
    return rows.flatten(1).float(), spread.flatten()[order].float()


def _latent_gains(config: ModelConfig, spread: Tensor) -> tuple[Tensor, Tensor]:
    """What multiplies each coefficient before the quantiser, and after it, (L,) each."""
    if config.quantizer in ("round", "noise", "universal"):
        # Steps of a quarter, alike for all coefficients: a rounding noise of 43 dB at 24 latents for 8x8 pixels.
        gain = torch.full_like(spread, 4.0)
        return gain, 1 / gain
    if config.quantizer in ("vq", "gumbel"):
        # Vectors of length 1 on average, as the first codes are.
        gain = 1 / (spread * math.sqrt(config.code_channels))
        return gain, 1 / gain
    if config.quantizer in ("sign", "lfq"):
        # +1 and -1 stand for the mean of a normal variable's halves.
        return 1 / spread, math.sqrt(2 / math.pi) * spread
    if config.quantizer in ("binarizer", "fsq"):
        # Behind a normal variable's tanh: E[z tanh z] = 0.606, over the mean square, 1 of bits and 0.394 of levels.
        return 1 / spread, spread * (0.606 if config.quantizer == "binarizer" else 0.606 / 0.394)
    # Two standard deviations on either side fill the range of the levels.
    gain = config.levels / 4 / spread
    return gain, 1 / gain
