"""A lower bound that a value below it can be led back to."""

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pipelines.model.straight_through.width import wide


class _LowerBound(Function):
    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.clamp_min(bound)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.bound = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return torch.where((x >= ctx.bound) | (gradient < 0), gradient, 0.0), None


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """`max(x, bound)`; below the bound only a gradient passes whose descent step raises x.

    As in GDN and the scales of a hyperprior (Ballé 2018, arXiv:1802.01436); the plain maximum would leave x below for
    ever.

    Args:
        x: any shape.
    """
    return _LowerBound.apply(wide(x), bound)


class LowerBound(nn.Module):
    """`lower_bound` as a module (Ballé 2018, arXiv:1802.01436)."""

    def __init__(self, bound: float):
        super().__init__()
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        return lower_bound(x, self.bound)
