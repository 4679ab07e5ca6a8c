"""One bit a value: its sign."""

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pipelines.model.straight_through.estimator import straight_through
from pipelines.model.straight_through.noise import needed
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


def stochastic_sign(x: Tensor, noise: Tensor) -> Tensor:
    """+1 with the probability (1 + x) / 2, else -1, so that the mean is x; the gradient is that of x.

    Toderici 2016, arXiv:1511.06085 (there x is a tanh, on -1 to 1; beyond it is as at the ends).

    Args:
        x: any shape.
        noise: the same shape, uniform on [-0.5, 0.5), drawn by the caller.
    """
    x = wide(x)
    hard = torch.where(noise.to(x.dtype) < x / 2, 1.0, -1.0).to(x.dtype)
    return straight_through(x, torch.where(x.isnan(), x, hard).detach())


class SignSTE(nn.Module):
    """`sign_ste` as a module (Hubara 2016, arXiv:1602.02830)."""

    def forward(self, x: Tensor) -> Tensor:
        return sign_ste(x)


class Binarizer(nn.Module):
    """tanh, then one bit a value: `stochastic_sign` in training, in evaluation the sign.

    The gradient goes through the bit as if it were not there, and through the tanh as it is (Toderici 2016,
    arXiv:1511.06085).
    """

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noise, of the shape of `x`, is needed in training and ignored in evaluation.

        Raises:
            CodecmillError: in training there is no noise.
        """
        soft = torch.tanh(wide(x))
        if not self.training:
            return straight_through(soft, sign_ste(soft).detach())
        return stochastic_sign(soft, needed(noise, "binarizer"))
