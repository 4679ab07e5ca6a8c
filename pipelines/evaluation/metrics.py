"""How near a reconstruction is to its original: PSNR and MS-SSIM of 8-bit RGB pictures, and their means."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipelines.config import SMALLEST_MS_SSIM
from pipelines.errors import CodecmillError

Picture = Image.Image | np.ndarray
"""An RGB picture, as PIL has it or as uint8 (H, W, 3)."""

LARGEST_PSNR = 100.0
"""What is reported, in dB, for equal pictures and for any nearer than that: JSON has no infinity, and one such picture
would make every mean infinite. Training caps its PSNR at the same value."""

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the five scales of MS-SSIM, finest first (Wang 2003)."""

SMALLEST_SIDE = SMALLEST_MS_SSIM
"""Of a picture that MS-SSIM is defined for, in pixels."""

WINDOW_MARGIN = 5
"""Pixels at each edge where the Gaussian window of SSIM reaches beyond the picture."""

WINDOW_SIGMA = 1.5
"""Of that window, in pixels."""

LUMINANCE_FLOOR, CONTRAST_FLOOR = 0.01**2, 0.03**2
"""SSIM's two constants, on the scale 0 to 1: what keeps black and flat surroundings from deciding."""

BAND_PIXELS = 1 << 18
"""Compared at a time, for it takes some hundred bytes a pixel."""


class Quality(NamedTuple):
    """Of one reconstruction.

    Attributes:
        psnr: in dB, at most `LARGEST_PSNR`.
        ms_ssim: up to 1; None for a picture with a side under `SMALLEST_SIDE`.
    """

    psnr: float
    ms_ssim: float | None


def compare(original: Picture, reconstruction: Picture) -> Quality:
    """All figures of a pair, as they are reported."""
    return Quality(min(psnr(original, reconstruction), LARGEST_PSNR), ms_ssim(original, reconstruction))


def psnr(original: Picture, reconstruction: Picture) -> float:
    """Peak signal to noise ratio over all pixels and channels, 10 log10(255^2 / mse), in dB; inf for equal pictures.

    Raises:
        CodecmillError: the two are not 8-bit RGB pictures of one size.
    """
    one, other = _pixels(original, reconstruction)
    total = sum(
        int(np.square(one[rows].astype(np.int32) - other[rows]).sum(dtype=np.int64)) for rows in _bands(*one.shape[:2])
    )
    return 10 * math.log10(255**2 * one.size / total) if total else math.inf


def ms_ssim(original: Picture, reconstruction: Picture) -> float | None:
    """Multi-scale structural similarity (Wang 2003), as torchmetrics' multiscale_structural_similarity_index_measure.

    Computed in bands of rows, so that the memory does not grow with the picture; the bands' contrast terms are averaged
    over their pixels, which changes nothing but the rounding. Fewer scales for small pictures would give figures that
    cannot be compared with the others', so they get none.

    Returns:
        The index, or None where a side is under `SMALLEST_SIDE` pixels.

    Raises:
        CodecmillError: the two are not 8-bit RGB pictures of one size.
    """
    one, other = (torch.from_numpy(pixels).permute(2, 0, 1)[None] for pixels in _pixels(original, reconstruction))
    if min(one.shape[2:]) < SMALLEST_SIDE:
        return None
    index = 1.0
    for weight in SCALE_WEIGHTS[:-1]:
        index *= max(0.0, _contrast(one, other)) ** weight
        one, other = _halved(one), _halved(other)
    return index * max(0.0, _similarity(one, other)) ** SCALE_WEIGHTS[-1]


def means(qualities: Iterable[Quality]) -> dict[str, float]:
    """The mean of each metric over the pictures that have it; a metric that none has is left out."""
    rows = list(qualities)
    columns = {"psnr": [row.psnr for row in rows], "ms_ssim": [row.ms_ssim for row in rows if row.ms_ssim is not None]}
    return {name: math.fsum(values) / len(values) for name, values in columns.items() if values}


def _pixels(original: Picture, reconstruction: Picture) -> tuple[np.ndarray, np.ndarray]:
    pair = []
    for picture in (original, reconstruction):
        pixels = np.array(picture)
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
            raise CodecmillError(
                f"Metrics compare 8-bit RGB pictures (H, W, 3), but got {pixels.dtype} of shape {pixels.shape}: "
                "open it with pipelines.data.images.open_image."
            )
        pair.append(pixels)
    if pair[0].shape != pair[1].shape:
        raise CodecmillError(
            f"The reconstruction is {_size(pair[1].shape)} pixels, but its original {_size(pair[0].shape)}: "
            "crop it to the original's size."
        )
    return pair[0], pair[1]


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[0]}"


def _bands(height: int, width: int, margin: int = 0) -> Iterator[slice]:
    """Rows that make up a picture, about `BAND_PIXELS` at a time and an even number; each band wider by the margins."""
    step = max(2, BAND_PIXELS // width // 2 * 2)
    for first in range(0, height - 2 * margin, step):
        yield slice(first, min(first + step, height - 2 * margin) + 2 * margin)


def _contrast(one: Tensor, other: Tensor) -> float:
    """The mean contrast and structure term of one scale over the pixels whose window lies within the picture.

    As torchmetrics has it, whose window of 11 by 11 pixels takes four times as long as this one of 11 and 11, and whose
    import takes a second and a half.
    """
    height, width = one.shape[2:]
    total = 0.0
    for rows in _bands(height, width, WINDOW_MARGIN):
        _, contrast = _terms(_unit(one[:, :, rows]), _unit(other[:, :, rows]))
        total += contrast.mean().item() * (rows.stop - rows.start - 2 * WINDOW_MARGIN)
    return total / (height - 2 * WINDOW_MARGIN)


def _similarity(one: Tensor, other: Tensor) -> float:
    """The whole index of the last scale; as torchmetrics has it, over the edges too, where the picture is mirrored."""
    mirrored = [F.pad(x, [WINDOW_MARGIN] * 4, mode="reflect") for x in (one, other)]
    luminance, contrast = _terms(*mirrored)
    return (luminance * contrast).mean().item()


def _terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM's term of luminance, and that of contrast and structure, wherever the window lies within the picture."""
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = _blurred(torch.cat([x, y, x * x, y * y, x * y], dim=1)).chunk(5, 1)
    luminance = (2 * mean_x * mean_y + LUMINANCE_FLOOR) / (mean_x.square() + mean_y.square() + LUMINANCE_FLOOR)
    variances = (mean_xx - mean_x.square()).clamp_min(0) + (mean_yy - mean_y.square()).clamp_min(0)
    covariance = mean_xy - mean_x * mean_y
    return luminance, (2 * covariance + CONTRAST_FLOOR) / (variances + CONTRAST_FLOOR)


def _blurred(x: Tensor) -> Tensor:
    """(1, C, H, W) under SSIM's Gaussian window, along the rows and then the columns: (1, C, H - 10, W - 10)."""
    places = torch.arange(-WINDOW_MARGIN, WINDOW_MARGIN + 1, dtype=torch.float64)
    window = torch.exp(-((places / WINDOW_SIGMA) ** 2) / 2)
    window = (window / window.sum()).to(x.dtype).expand(x.shape[1], 1, -1)
    return F.conv2d(F.conv2d(x, window[:, :, None], groups=x.shape[1]), window[..., None], groups=x.shape[1])


def _halved(x: Tensor) -> Tensor:
    """The next scale: the mean of every two by two pixels; an odd last row or column is dropped."""
    even = x[:, :, : x.shape[2] // 2 * 2]
    return torch.cat([F.avg_pool2d(_unit(even[:, :, rows]), 2) for rows in _bands(*even.shape[2:])], dim=2)


def _unit(x: Tensor) -> Tensor:
    """float32 on the scale 0 to 1."""
    return x if x.is_floating_point() else x.float() / 255
