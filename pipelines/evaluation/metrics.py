"""How near a reconstruction is to its original: PSNR and MS-SSIM of 8-bit RGB pictures, and their means."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pipelines.config import SMALLEST_MS_SSIM
from pipelines.errors import CodecmillError
from pipelines.model.structural_similarity import SCALE_WEIGHTS, WINDOW_MARGIN, contrast, similarity

Picture = Image.Image | np.ndarray
"""An RGB picture, as PIL has it or as uint8 (H, W, 3)."""

LARGEST_PSNR = 100.0
"""What is reported, in dB, for equal pictures and for any nearer than that: JSON has no infinity, and one such picture
would make every mean infinite. Training caps its PSNR at the same value."""

Decibels = Annotated[float, Field(ge=0, le=LARGEST_PSNR)]
"""A PSNR as it is reported, also where a file says so."""

Index = Annotated[float, Field(ge=0, le=1.001)]
"""An MS-SSIM as it is reported, which float32 may round to above 1."""

SMALLEST_SIDE = SMALLEST_MS_SSIM
"""Of a picture that MS-SSIM is defined for, in pixels."""

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
    return index * max(0.0, similarity(one, other).mean().item()) ** SCALE_WEIGHTS[-1]


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
    """The mean contrast and structure term of one scale."""
    height, width = one.shape[2:]
    total = 0.0
    for rows in _bands(height, width, WINDOW_MARGIN):
        found = contrast(_unit(one[:, :, rows]), _unit(other[:, :, rows]))
        total += found.mean().item() * (rows.stop - rows.start - 2 * WINDOW_MARGIN)
    return total / (height - 2 * WINDOW_MARGIN)


def _halved(x: Tensor) -> Tensor:
    """The next scale: the mean of every two by two pixels; an odd last row or column is dropped."""
    even = x[:, :, : x.shape[2] // 2 * 2]
    return torch.cat([F.avg_pool2d(_unit(even[:, :, rows]), 2) for rows in _bands(*even.shape[2:])], dim=2)


def _unit(x: Tensor) -> Tensor:
    """float32 on the scale 0 to 1."""
    return x if x.is_floating_point() else x.float() / 255
