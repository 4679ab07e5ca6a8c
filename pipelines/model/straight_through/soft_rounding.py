"""A smooth function between the identity and rounding, and its inverse (Agustsson and Theis 2020, arXiv:2006.09952)."""

import math

import torch
from torch import Tensor

from pipelines.errors import CodecmillError
from pipelines.model.straight_through.width import wide

NEARLY_IDENTITY = 1e-3
"""Below this alpha soft rounding is the identity to within 1e-8, and its formula would divide by almost nothing."""


def soft_round(x: Tensor, alpha: float) -> Tensor:
    """`m + tanh(alpha r) / (2 tanh(alpha / 2))` with `m = floor(x) + 1/2`, `r = x - m`; its gradient is its own.

    The identity for alpha towards 0, rounding for alpha towards infinity; integers and halves stay where they are
    (Agustsson and Theis 2020, arXiv:2006.09952).

    Args:
        x: any shape.
        alpha: hardness, 0 or more.

    Raises:
        CodecmillError: alpha is negative or no number.
    """
    x = wide(x)
    if _is_identity(alpha):
        return x.clone()
    middle = torch.floor(x) + 0.5
    return middle + torch.tanh(alpha * (x - middle)) / (2 * math.tanh(alpha / 2))


def soft_round_inverse(y: Tensor, alpha: float) -> Tensor:
    """The x of which `soft_round(x, alpha)` is y: `m + atanh(2 tanh(alpha / 2) (y - m)) / alpha`, `m = floor(y) + 1/2`.

    Agustsson and Theis 2020, arXiv:2006.09952.

    Args:
        y: any shape.
        alpha: hardness, 0 or more; from some 16 on in float32 (37 in float64) nothing is left to invert near integers.

    Raises:
        CodecmillError: alpha is negative or no number.
    """
    y = wide(y)
    if _is_identity(alpha):
        return y.clone()
    middle = torch.floor(y) + 0.5
    # An integer's own value may round to a little beyond what tanh reaches.
    reach = torch.finfo(y.dtype).eps
    scaled = (2 * math.tanh(alpha / 2) * (y - middle)).clamp(-1 + reach, 1 - reach)
    return middle + (torch.atanh(scaled) / alpha).clamp(-0.5, 0.5)


def _is_identity(alpha: float) -> bool:
    if not alpha >= 0:
        raise CodecmillError(f"Soft rounding needs a hardness alpha of 0 or more, but got {alpha}.")
    return alpha < NEARLY_IDENTITY
