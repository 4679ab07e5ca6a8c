"""Building blocks that the models share."""

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F


class Unfilled(nn.Conv2d):
    """A convolution that is made without first weights; whoever builds the model fills them in.

    The usual constructor would draw them from, and so advance, the global generator. torch's own `skip_init` makes the
    same by way of the meta device, for which torch loads its decompositions: half a second of each process.
    """

    def reset_parameters(self) -> None:
        pass


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps height and width (over `stride`), its weights not yet filled."""
    return Unfilled(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups)


class _LeakyReLU(Function):
    @staticmethod
    def forward(x: Tensor, slope: float) -> Tensor:
        return F.leaky_relu(x, slope)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.slope = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        (output,) = ctx.saved_tensors
        return torch.ops.aten.leaky_relu_backward(gradient, output, ctx.slope, self_is_result=True), None


def leaky_relu(x: Tensor, slope: float) -> Tensor:
    """x where it is above zero, else `slope * x`, bit for bit torch's and with its gradient; any shape.

    torch's keeps x until the backward pass. This keeps what it returns, which tells the sign of x as well and which a
    convolution behind it keeps anyway: half the memory where the two alternate. Compiled for a CPU, torch's keeps a
    mask of booleans, which Inductor's code (torch 2.14) takes longer to write than a convolution to compute.

    Args:
        slope: above zero.
    """
    return _LeakyReLU.apply(x, slope)
