"""The structural similarity of pictures (SSIM, Wang 2004), whose means over five scales make up MS-SSIM (Wang 2003).

As torchmetrics has it, whose import takes a second and a half, whose window of 11 by 11 pixels takes four times as long
as this one of 11 and 11, and whose mirrored edges have no deterministic gradient on a GPU.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the five scales of MS-SSIM, finest first (Wang 2003)."""

WINDOW_MARGIN = 5
"""Pixels at each edge where the Gaussian window of SSIM reaches beyond the picture."""

WINDOW_SIGMA = 1.5
"""Of that window, in pixels."""

LUMINANCE_FLOOR, CONTRAST_FLOOR = 0.01**2, 0.03**2
"""SSIM's two constants, on the scale 0 to 1: what keeps black and flat surroundings from deciding."""


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Of each sample, (N,), with a gradient; terms below zero count as zero, for powers have none there.

    Args:
        x, y: (N, C, H, W), floating point on the scale 0 to 1, no side under `SMALLEST_MS_SSIM` pixels.
    """
    index = x.new_ones(len(x))
    for weight in SCALE_WEIGHTS[:-1]:
        index = index * _mean(contrast(x, y)) ** weight
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return index * _mean(similarity(x, y)) ** SCALE_WEIGHTS[-1]


def contrast(x: Tensor, y: Tensor) -> Tensor:
    """The term of contrast and structure wherever the window lies within the picture: (N, C, H - 10, W - 10)."""
    return _terms(x, y)[1]


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """The whole index of each pixel, (N, C, H, W): beyond the edges the picture is mirrored."""
    luminance, structure = _terms(_mirrored(x), _mirrored(y))
    return luminance * structure


def _mean(terms: Tensor) -> Tensor:
    return terms.mean(dim=(1, 2, 3)).relu()


def _terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM's term of luminance, and that of contrast and structure, wherever the window lies within the picture."""
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blurred(torch.cat([x, y, x * x, y * y, x * y], dim=1)).chunk(5, 1)
    luminance = (2 * mean_x * mean_y + LUMINANCE_FLOOR) / (mean_x.square() + mean_y.square() + LUMINANCE_FLOOR)
    variances = (mean_xx - mean_x.square()).clamp_min(0) + (mean_yy - mean_y.square()).clamp_min(0)
    covariance = mean_xy - mean_x * mean_y
    return luminance, (2 * covariance + CONTRAST_FLOOR) / (variances + CONTRAST_FLOOR)


def _blurred(x: Tensor) -> Tensor:
    """(N, C, H, W) under SSIM's Gaussian window, along the rows and then the columns: (N, C, H - 10, W - 10)."""
    places = torch.arange(-WINDOW_MARGIN, WINDOW_MARGIN + 1, dtype=torch.float64, device=x.device)
    window = torch.exp(-((places / WINDOW_SIGMA) ** 2) / 2)
    window = (window / window.sum()).to(x.dtype).expand(x.shape[1], 1, -1)
    return F.conv2d(F.conv2d(x, window[:, :, None], groups=x.shape[1]), window[..., None], groups=x.shape[1])


def _mirrored(x: Tensor) -> Tensor:
    """(N, C, H + 10, W + 10), as `F.pad` mirrors, whose gradient is no deterministic one on a GPU."""
    for dim in (2, 3):
        size = x.shape[dim]
        before = x.narrow(dim, 1, WINDOW_MARGIN).flip(dim)
        after = x.narrow(dim, size - 1 - WINDOW_MARGIN, WINDOW_MARGIN).flip(dim)
        x = torch.cat([before, x, after], dim)
    return x
