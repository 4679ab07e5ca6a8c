"""Rounding to a grid of integers, shifted or clamped."""

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pipelines.errors import CodecmillError
from pipelines.model.straight_through.width import wide


class _Round(Function):
    @staticmethod
    def forward(x: Tensor, offset: Tensor | float) -> Tensor:
        return torch.round(x - offset) + offset

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        return gradient.clone(), None


class _ClampedRound(Function):
    @staticmethod
    def forward(x: Tensor, low: int, high: int) -> Tensor:
        return torch.round(x.clamp(low, high))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        passes = ((x >= ctx.low) | (gradient < 0)) & ((x <= ctx.high) | (gradient > 0))
        return torch.where(passes, gradient, 0.0), None, None


def round_ste(x: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """Round to the grid `offset + integers`, halves to even; the gradient is that of x (Theis 2017, arXiv:1703.00395).

    Args:
        x: any shape.
        offset: a number, or a tensor that broadcasts to the shape of `x`; it receives no gradient.

    Raises:
        CodecmillError: the offset does not broadcast to the shape of `x`.
    """
    x = wide(x)
    if isinstance(offset, Tensor):
        _check_broadcast("The offset", offset, x)
        offset = offset.to(x.dtype)
    return _Round.apply(x, offset)


def clamped_round(x: Tensor, levels: int) -> Tensor:
    """Round to one of `levels` neighbouring integers, from `-(levels // 2)` up (8 levels: -4 to 3).

    The gradient is that of x inside the range, ends included. Outside it passes only where a descent step leads back
    towards the range, and is zero where it would lead further away, so that no latent is stuck outside (the rule of
    the lower bound in Ballé 2018, arXiv:1802.01436).

    Args:
        x: any shape.
        levels: 2 or more.
    """
    low = -(levels // 2)
    return _ClampedRound.apply(wide(x), low, low + levels - 1)


def _check_broadcast(what: str, value: Tensor, x: Tensor) -> None:
    sizes = zip(reversed(value.shape), reversed(x.shape), strict=False)
    if value.dim() > x.dim() or any(own not in (1, size) for own, size in sizes):
        raise CodecmillError(
            f"{what} has shape {tuple(value.shape)}, which does not broadcast to {tuple(x.shape)}: "
            "give it the size 1 or that of the input in each dimension."
        )


class Round(nn.Module):
    """`round_ste` as a module (Theis 2017, arXiv:1703.00395)."""

    def forward(self, x: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        return round_ste(x, offset)


class ClampedRound(nn.Module):
    """`clamped_round` to `levels` integers as a module."""

    def __init__(self, levels: int):
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        return clamped_round(x, self.levels)
