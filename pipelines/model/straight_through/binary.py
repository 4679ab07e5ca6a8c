"""One bit a value: its sign."""

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pipelines.model.straight_through.width import wide


class _Sign(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.where(x.isnan(), x, torch.where(x >= 0, 1.0, -1.0))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() <= 1, gradient, 0.0)


def sign_ste(x: Tensor) -> Tensor:
    """+1 where x >= 0 (so sign(0) = +1), else -1; the gradient passes where |x| <= 1 (Hubara 2016, arXiv:1602.02830).

    Args:
        x: any shape.
    """
    return _Sign.apply(wide(x))


class Sign(nn.Module):
    """`sign_ste` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return sign_ste(x)
