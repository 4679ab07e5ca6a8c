"""Layers that quantise on the way forward and let the gradient through on the way back.

Each is a pure function with a module beside it. All compute in float32, in float64 for float64 inputs, and never in a
lower precision: under autocast, bfloat16 or float16 inputs give float32 results. A NaN comes out as NaN, so that a
training that diverged is seen. Random numbers are always given by the caller.
"""

import torch
from torch import Tensor, nn
from torch.autograd import Function

from pipelines.errors import CodecmillError


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


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


def round_ste(x: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """Round to the grid `offset + integers`, halves to even; the gradient is that of x (Theis 2017, arXiv:1703.00395).

    Args:
        x: any shape.
        offset: a number, or a tensor that broadcasts to the shape of `x`; it receives no gradient.

    Raises:
        CodecmillError: the offset does not broadcast to the shape of `x`.
    """
    x = _wide(x)
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
    return _ClampedRound.apply(_wide(x), low, low + levels - 1)


def sign_ste(x: Tensor) -> Tensor:
    """+1 where x >= 0 (so sign(0) = +1), else -1; the gradient passes where |x| <= 1 (Hubara 2016, arXiv:1602.02830).

    Args:
        x: any shape.
    """
    return _Sign.apply(_wide(x))


def nearest_centre(x: Tensor, centres: Tensor) -> Tensor:
    """Symbols: the index (int64, the shape of `x`) of the centre next to each value; the first of equals.

    Args:
        x: any shape.
        centres: (levels,).
    """
    return (_wide(x).unsqueeze(-1) - _wide(centres)).abs().argmin(dim=-1)


def soft_assignment(x: Tensor, centres: Tensor, sigma: float) -> Tensor:
    """`sum_j p_j c_j` with `p = softmax_j(-sigma (x - c_j)^2)`, differentiable in x and the centres (Agustsson 2017).

    Args:
        x: any shape.
        centres: (levels,).
        sigma: hardness, per squared unit of x.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, centres = _wide(x), _wide(centres)
        weights = torch.softmax(-sigma * (x.unsqueeze(-1) - centres).square(), dim=-1)
        return (weights * centres).sum(dim=-1)


def soft_to_hard(x: Tensor, centres: Tensor, sigma: float) -> Tensor:
    """The nearest centre on the way forward, `soft_assignment` on the way back.

    Agustsson 2017 (arXiv:1704.00648), with the hard forward pass of Mentzer 2018 (arXiv:1801.04260).

    Args:
        x: any shape.
        centres: (levels,); they learn through the soft assignment.
        sigma: hardness, per squared unit of x.
    """
    soft = soft_assignment(x, centres, sigma)
    hard = _wide(centres)[nearest_centre(x, centres)].to(soft.dtype)
    return straight_through(soft, torch.where(x.isnan(), soft, hard).detach())


def additive_noise(x: Tensor, noise: Tensor) -> Tensor:
    """`x + noise`, the differentiable stand-in for rounding in training (Ballé 2017, arXiv:1611.01704).

    Args:
        x: any shape.
        noise: the same shape, uniform on [-0.5, 0.5), drawn by the caller.

    Raises:
        CodecmillError: the shapes differ.
    """
    x = _wide(x)
    if noise.shape != x.shape:
        raise CodecmillError(
            f"The noise has shape {tuple(noise.shape)}, but the latents have {tuple(x.shape)}: "
            "draw it with the shape that model.noise_shape(n, h, w) gives."
        )
    return x + noise.to(x.dtype)


def _check_broadcast(what: str, value: Tensor, x: Tensor) -> None:
    sizes = zip(reversed(value.shape), reversed(x.shape), strict=False)
    if value.dim() > x.dim() or any(own not in (1, size) for own, size in sizes):
        raise CodecmillError(
            f"{what} has shape {tuple(value.shape)}, which does not broadcast to {tuple(x.shape)}: "
            "give it the size 1 or that of the input in each dimension."
        )


class Round(nn.Module):
    """`round_ste` as a module."""

    def forward(self, x: Tensor, offset: Tensor | float = 0.0) -> Tensor:
        return round_ste(x, offset)


class ClampedRound(nn.Module):
    """`clamped_round` to `levels` integers as a module."""

    def __init__(self, levels: int):
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        return clamped_round(x, self.levels)


class Sign(nn.Module):
    """`sign_ste` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return sign_ste(x)


class SoftToHardQuantizer(nn.Module):
    """`soft_to_hard` over `levels` learned centres.

    The centres start one apart and symmetric about 0, where with sigma 1 the soft assignment has slope 1 between them.
    """

    def __init__(self, levels: int, sigma: float):
        super().__init__()
        self.sigma = sigma
        self.centres = nn.Parameter(torch.arange(levels, dtype=torch.get_default_dtype()) - (levels - 1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return soft_to_hard(x, self.centres, self.sigma)

    def symbols(self, x: Tensor) -> Tensor:
        """The index of the centre that stands for each value: int64, the shape of `x`."""
        return nearest_centre(x, self.centres)


class UniformNoise(nn.Module):
    """`additive_noise` in training, `round_ste` in evaluation."""

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Noise, of the shape of `x`, is needed in training and ignored in evaluation.

        Raises:
            CodecmillError: in training there is no noise, or it has another shape.
        """
        if not self.training:
            return round_ste(x)
        if noise is None:
            raise CodecmillError(
                "The noise quantiser needs noise in training, but got none: draw it uniform on [-0.5, 0.5) with the "
                "shape that model.noise_shape(n, h, w) gives, or call model.eval() to round instead."
            )
        return additive_noise(x, noise)
