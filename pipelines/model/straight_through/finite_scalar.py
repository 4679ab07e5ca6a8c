"""Finite scalar quantisation: each channel rounded to a few levels (Mentzer 2023, arXiv:2309.15505)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipelines.errors import CodecmillError
from pipelines.model.straight_through.rounding import round_ste
from pipelines.model.straight_through.width import wide

MARGIN = 1e-3
"""By which the bound reaches beyond the outer levels, far from the next that there is not.

In the paper it stays within them, where two levels could not be shifted to be symmetric.
"""


def finite_scalar_bound(x: Tensor, levels: Sequence[int]) -> Tensor:
    """`((L-1)/2 + margin) tanh(x + s) - o`: each channel into the range of its L levels, 0 to 0; the gradient its own.

    The offset o is 1/2 for an even number of levels and 0 for an odd one; the shift s makes up for it at 0. Mentzer
    2023, arXiv:2309.15505, but for the margin's sign; and of two levels, which it would shift so far that nearly all
    is rounded to one of them, 0 is the threshold.

    Args:
        x: (N, C, ...).
        levels: of each of the C channels, 2 or more.

    Raises:
        CodecmillError: there are not as many levels as channels, or fewer than 2 in one.
    """
    x = wide(x)
    if x.dim() < 2 or x.shape[1] != len(levels) or min(levels) < 2:
        raise CodecmillError(
            f"FSQ takes (N, {len(levels)}, ...) for the levels {tuple(levels)}, each 2 or more, but got "
            f"{tuple(x.shape)}: give it the number of levels of each channel."
        )
    half, offset = _halves(levels, x)
    with torch.autocast(x.device.type, enabled=False):
        shift = torch.where(half > 1, torch.atanh(offset / half), 0.0)
        return half * torch.tanh(x + shift) - offset


def finite_scalar(x: Tensor, levels: Sequence[int]) -> Tensor:
    """The bound rounded to integers and scaled to -1 ... 1; the gradient is that of the bound.

    Mentzer 2023, arXiv:2309.15505.

    Args:
        x: (N, C, ...).
        levels: of each of the C channels, 2 or more: L of them are `-(L // 2)` up, over `L // 2`.

    Raises:
        CodecmillError: as `finite_scalar_bound`.
    """
    scale = _along_channels([count // 2 for count in levels], wide(x))
    return round_ste(finite_scalar_bound(x, levels)) / scale


def _halves(levels: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    half = _along_channels([(count - 1) / 2 + MARGIN for count in levels], like)
    return half, _along_channels([0.5 if count % 2 == 0 else 0.0 for count in levels], like)


def _along_channels(values: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(list(values)).reshape(-1, *(1,) * (like.dim() - 2))


class FSQ(nn.Module):
    """`finite_scalar` as a module (Mentzer 2023, arXiv:2309.15505)."""

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        self.levels = tuple(levels)

    def forward(self, x: Tensor) -> Tensor:
        return finite_scalar(x, self.levels)

    def symbols(self, x: Tensor) -> Tensor:
        """The index of each value's level, 0 to L - 1: int64, the shape of `x`."""
        lowest = _along_channels([count // 2 for count in self.levels], wide(x)).long()
        return torch.round(finite_scalar_bound(x, self.levels)).long() + lowest

    @property
    def bits(self) -> float:
        """Of one vector of C channels, at most: the base-2 logarithm of the number of its values."""
        return sum(math.log2(count) for count in self.levels)
