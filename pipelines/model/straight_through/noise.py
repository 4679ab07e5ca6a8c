"""Uniform noise in the place of rounding."""

import torch
from torch import Tensor, nn

from pipelines.errors import CodecmillError
from pipelines.model.straight_through.rounding import round_ste
from pipelines.model.straight_through.width import wide


def additive_noise(x: Tensor, noise: Tensor) -> Tensor:
    """`x + noise`, the differentiable stand-in for rounding in training (Ballé 2017, arXiv:1611.01704).

    Args:
        x: any shape.
        noise: the same shape, uniform on [-0.5, 0.5), drawn by the caller.

    Raises:
        CodecmillError: the shapes differ.
    """
    x = wide(x)
    if noise.shape != x.shape:
        raise CodecmillError(
            f"The noise has shape {tuple(noise.shape)}, but the latents have {tuple(x.shape)}: "
            "draw it with the shape that model.noise_shape(n, h, w) gives."
        )
    return x + noise.to(x.dtype)


def universal_quantise(x: Tensor, noise: Tensor) -> Tensor:
    """`round(x - u) + u`: the error is uniform and independent of x, as with noise, and yet there are symbols.

    Agustsson and Theis 2020, arXiv:2006.09952; the gradient is that of x. Sender and receiver share u.

    Args:
        x: any shape.
        noise: u, of the same shape or one that broadcasts to it, uniform on [-0.5, 0.5), drawn by the caller.

    Raises:
        CodecmillError: the noise does not broadcast to the shape of `x`.
    """
    return round_ste(x, noise)


class _Hardening(nn.Module):
    """Quantises with noise in training until `hard`, a tensor of no dimension, says otherwise.

    From then on values are rounded and no gradient passes: what comes before is to stay as it is, and what follows gets
    used to what it will see (Guo 2021, arXiv:2104.05168). A tensor, so that a compiled step sees what it says.
    """

    hard: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hard", torch.tensor(False), persistent=False)

    def _chosen(self, x: Tensor, noisy: Tensor) -> Tensor:
        return torch.where(self.hard, round_ste(x).detach(), noisy)


class UniformNoise(_Hardening):
    """`additive_noise` in training, `round_ste` in evaluation (Ballé 2017, arXiv:1611.01704)."""

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noise, of the shape of `x`, is needed in training and ignored in evaluation.

        Raises:
            CodecmillError: in training there is no noise, or it has another shape.
        """
        if not self.training:
            return round_ste(x)
        return self._chosen(x, additive_noise(x, needed(noise, "noise")))


class UniversalQuantizer(_Hardening):
    """`universal_quantise` in training, `round_ste` in evaluation, where a shift would gain nothing.

    Agustsson and Theis 2020, arXiv:2006.09952.
    """

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noise that broadcasts to the shape of `x` is needed in training and ignored in evaluation.

        Raises:
            CodecmillError: in training there is no noise, or its shape does not fit.
        """
        if not self.training:
            return round_ste(x)
        return self._chosen(x, universal_quantise(x, needed(noise, "universal")))


def needed(noise: Tensor | None, quantizer: str) -> Tensor:
    """The noise that a quantiser was given.

    Raises:
        CodecmillError: it was given none.
    """
    if noise is None:
        raise CodecmillError(
            f"The {quantizer} quantiser needs noise in training, but got none: draw it uniform on [-0.5, 0.5) with the "
            "shape that model.noise_shape(n, h, w) gives, or call model.eval() to round instead."
        )
    return noise
