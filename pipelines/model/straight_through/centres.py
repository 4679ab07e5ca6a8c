"""Quantising to learned centres, softly on the way back."""

import torch
from torch import Tensor, nn

from pipelines.model.straight_through.estimator import straight_through
from pipelines.model.straight_through.width import wide


def nearest_centre(x: Tensor, centres: Tensor) -> Tensor:
    """Symbols: the index (int64, the shape of `x`) of the centre next to each value; the first of equals.

    Args:
        x: any shape.
        centres: (levels,).
    """
    return (wide(x).unsqueeze(-1) - wide(centres)).abs().argmin(dim=-1)


def soft_assignment(x: Tensor, centres: Tensor, sigma: float | Tensor) -> Tensor:
    """`sum_j p_j c_j` with `p = softmax_j(-sigma (x - c_j)^2)`, differentiable in x and the centres.

    Agustsson 2017, arXiv:1704.00648.

    Args:
        x: any shape.
        centres: (levels,).
        sigma: hardness, per squared unit of x.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, centres = wide(x), wide(centres)
        weights = torch.softmax(-sigma * (x.unsqueeze(-1) - centres).square(), dim=-1)
        return (weights * centres).sum(dim=-1)


def soft_to_hard(x: Tensor, centres: Tensor, sigma: float | Tensor) -> Tensor:
    """The nearest centre on the way forward, `soft_assignment` on the way back.

    Agustsson 2017 (arXiv:1704.00648), with the hard forward pass of Mentzer 2018 (arXiv:1801.04260).

    Args:
        x: any shape.
        centres: (levels,); they learn through the soft assignment.
        sigma: hardness, per squared unit of x.
    """
    soft = soft_assignment(x, centres, sigma)
    hard = wide(centres)[nearest_centre(x, centres)].to(soft.dtype)
    return straight_through(soft, torch.where(x.isnan(), soft, hard).detach())


class SoftToHardQuantizer(nn.Module):
    """`soft_to_hard` over `levels` learned centres (Agustsson 2017, arXiv:1704.00648; Mentzer 2018, arXiv:1801.04260).

    The centres start one apart and symmetric about 0, where with sigma 1 the soft assignment has slope 1 between them.
    `sigma` is a tensor of no dimension, so that a schedule can fill it and a compiled step sees what it says. It is no
    part of the state: no value depends on it, only gradients, and there it is a function of the step's number, which
    the schedule fills in before each step. Weights that start another run, or are used, bring no hardness along.
    """

    sigma: Tensor

    def __init__(self, levels: int, sigma: float):
        super().__init__()
        self.register_buffer("sigma", torch.tensor(sigma), persistent=False)
        self.centres = nn.Parameter(torch.arange(levels, dtype=torch.get_default_dtype()) - (levels - 1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return soft_to_hard(x, self.centres, self.sigma)

    def symbols(self, x: Tensor) -> Tensor:
        """The index of the centre that stands for each value: int64, the shape of `x`."""
        return nearest_centre(x, self.centres)
