"""The straight-through estimator itself: the value of one tensor, the gradient of another."""

from torch import Tensor
from torch.autograd import Function

from pipelines.errors import CodecmillError


class _StraightThrough(Function):
    @staticmethod
    def forward(soft: Tensor, hard: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        return gradient.clone(), None


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """`soft + (hard - soft).detach()`: the value of `hard`, the gradient of `soft` (Bengio 2013, arXiv:1308.3432).

    The value is `hard` bit for bit, where the formula would round twice.

    Args:
        soft: any shape, floating point; it receives the whole gradient.
        hard: the same shape, floating point; it receives none.

    Raises:
        CodecmillError: the shapes differ, or `hard` is no floating-point tensor.
    """
    if soft.shape != hard.shape or not hard.is_floating_point():
        raise CodecmillError(
            "straight_through takes two floating-point tensors of one shape, but got "
            f"soft {tuple(soft.shape)} {soft.dtype} and hard {tuple(hard.shape)} {hard.dtype}: "
            "expand or convert one of them first."
        )
    return _StraightThrough.apply(soft, hard)
