"""A Laplace variable that is rounded to integers: its bits, and integer tables of its probabilities.

Scales are told apart by their base-2 logarithm, on a grid. Training uses any scale between the ends of the grid; a file
is coded with the nearest one on it, whose table is stored with the model: nothing that decides on a symbol's
probability is computed in floating point where the file is read.
"""

import math

import numpy as np
import torch
from torch import Tensor

from pipelines.model.straight_through import lower_bound

LOWEST, HIGHEST = -5, 6
"""log2 of the smallest scale, where another symbol than zero costs 24 bits, and of the largest."""

PER_OCTAVE = 8
"""Scales on the grid: 0.1 % more bits than with a continuous scale."""

SCALES = (HIGHEST - LOWEST) * PER_OCTAVE + 1

LARGEST = 255
"""Symbols from -LARGEST to LARGEST have entries of their own; all others share the last one, and are escaped."""

TOTAL = 2**24
"""What a table's entries sum to."""

MOST_BITS = math.log2(TOTAL)
"""Of a symbol that has an entry of its own, which is at least 1."""


def bits(residual: Tensor, log2_scale: Tensor) -> Tensor:
    """Bits of a value that is rounded to an integer, or to which noise of the same width was added; elementwise.

    `-log2(F(r + 1/2) - F(r - 1/2))` with F the distribution function of scale b, finite with finite gradients for
    every r: each branch is given only values that it can take, for the gradient of a NaN that is not chosen is a NaN.

    Args:
        residual: r, any shape; computed in float32, or float64 where it is that.
        log2_scale: log2 b; below `LOWEST` only a gradient passes that raises it.
    """
    log2_scale = lower_bound(log2_scale, LOWEST).clamp_max(HIGHEST)
    rate = torch.exp2(-log2_scale)  # 1 / b
    size = residual.abs()
    # |r| >= 1/2: P = exp(-(|r| - 1/2) / b) * (1 - exp(-1 / b)) / 2
    outside = (size.clamp_min(0.5) - 0.5) * rate - torch.log(-torch.expm1(-rate)) + math.log(2)
    inner = size.clamp_max(0.5)
    # |r| < 1/2: P = 1 - (exp(-(1/2 - |r|) / b) + exp(-(1/2 + |r|) / b)) / 2
    inside = -torch.log1p(-0.5 * (torch.exp((inner - 0.5) * rate) + torch.exp((-inner - 0.5) * rate)))
    return torch.where(size < 0.5, inside, outside) / math.log(2)


def frequency_tables() -> Tensor:
    """One row a scale, int32 (SCALES, 2 * LARGEST + 2): how often of `TOTAL` each symbol comes, the escape last."""
    scale = 2.0 ** (LOWEST + np.arange(SCALES, dtype=np.float64)[:, None] / PER_OCTAVE)
    size = np.abs(np.arange(-LARGEST, LARGEST + 1, dtype=np.float64))
    outside = np.exp(-(np.maximum(size, 0.5) - 0.5) / scale) * -np.expm1(-1 / scale) / 2
    probabilities = np.where(size == 0, -np.expm1(-0.5 / scale), outside)
    escape = np.exp(-(LARGEST + 0.5) / scale)
    wanted = np.concatenate([probabilities, escape], axis=1)
    # Every symbol can be coded: at least one; the zero, the likeliest, takes what rounding leaves.
    table = np.maximum(np.rint(wanted * TOTAL), 1).astype(np.int64)
    table[:, LARGEST] += TOTAL - table.sum(axis=1)
    return torch.from_numpy(table.astype(np.int32))
