"""Reconstructions to look at: picture files at full size, small previews for the report, the grid of a validation."""

import re
import unicodedata
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops
from torch import Tensor

from pipelines.data.png_writing import write_png
from pipelines.durable_files import write_bytes

ERROR_FACTOR = 8
"""What absolute errors are multiplied by to be seen; from 32 levels of 255 on they are white."""

COMPARED = ("original", "reconstruction", "error")
KINDS = (*COMPARED, "side_by_side")
"""The files of a picture, `<kind>.png` each in a folder of its own."""

PREVIEW_SIDE = 640
"""The longer side of a preview, in pixels; smaller pictures keep their size."""

PREVIEW_BYTES = 50_000
"""The most that a preview takes in the report, so that 16 cards of three stay below 3.5 MB."""

THUMBNAIL_SIDE = 80
THUMBNAIL_BYTES = 4_000
GAP = 4
"""Pixels between pictures that are shown together."""

GAP_COLOUR = (128, 128, 128)


@dataclass(frozen=True)
class Previews:
    """WebP files of a picture, small enough to be embedded."""

    original: bytes
    reconstruction: bytes
    error: bytes
    thumbnail: bytes


def absolute_error(original: Image.Image, reconstruction: Image.Image) -> Image.Image:
    """`ERROR_FACTOR` times the absolute difference, channel by channel, white at 255; both RGB of one size."""
    brightness = [min(255, ERROR_FACTOR * level) for level in range(256)]
    return ImageChops.difference(original, reconstruction).point(brightness * 3)


def write_pictures(folder: Path, original: Image.Image, reconstruction: Image.Image) -> Previews:
    """Write original, reconstruction, absolute error, and the three side by side, as PNG files of full size."""
    error = absolute_error(original, reconstruction)
    pictures = (original, reconstruction, error, _side_by_side([original, reconstruction, error]))

    def write(kind: str, picture: Image.Image) -> None:
        write_bytes(folder / f"{kind}.png", write_png(picture))

    with ThreadPoolExecutor(len(KINDS)) as pool:
        list(pool.map(write, KINDS, pictures))
    return Previews(
        original=preview(original),
        reconstruction=preview(reconstruction),
        error=preview(error),
        thumbnail=_webp(reconstruction, THUMBNAIL_SIDE, THUMBNAIL_BYTES),
    )


def preview(picture: Image.Image) -> bytes:
    """A picture as WebP, small enough to be embedded."""
    return _webp(picture, PREVIEW_SIDE, PREVIEW_BYTES)


def preview_side_by_side(pictures: Iterable[Image.Image]) -> bytes:
    """Pictures of one size, read one at a time, side by side in a preview."""
    room = (PREVIEW_SIDE // len(COMPARED), PREVIEW_SIDE)
    return preview(_side_by_side([_shrunk(picture, room) for picture in pictures]))


def folder_name(number: int, name: str) -> str:
    """A folder for the picture called `name`, whatever that holds: one portable part of a path, unique by number."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    readable = re.sub(r"[^A-Za-z0-9]+", "-", re.sub(r"\.[A-Za-z]{2,5}$", "", ascii_name)).strip("-")[:60]
    return f"{number:05d}-{readable}".rstrip("-")


def grid(originals: Tensor, reconstructions: Tensor) -> Image.Image:
    """Originals in the upper row, each over its reconstruction; both uint8 (n, 3, H, W) with n > 0, on the CPU."""
    rows = [
        np.concatenate(list(np.pad(row.permute(0, 2, 3, 1).numpy(), ((0, 0), (0, GAP), (0, GAP), (0, 0)))), axis=1)
        for row in (originals, reconstructions)
    ]
    return Image.fromarray(np.concatenate(rows)[:-GAP, :-GAP])


def _side_by_side(pictures: list[Image.Image]) -> Image.Image:
    width, height = pictures[0].size
    sheet = Image.new("RGB", (len(pictures) * (width + GAP) - GAP, height), GAP_COLOUR)
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i * (width + GAP), 0))
    return sheet


def _webp(picture: Image.Image, side: int, most_bytes: int) -> bytes:
    """The picture as WebP, no longer than `side`, with the best quality that fits; smaller if none does."""
    shrunk = _shrunk(picture, (side, side))
    for quality in (88, 75, 55, 30):
        file = BytesIO()
        shrunk.save(file, format="WEBP", quality=quality, method=4)
        if file.tell() <= most_bytes:
            return file.getvalue()
    return _webp(picture, side * 2 // 3, most_bytes)


def _shrunk(picture: Image.Image, room: tuple[int, int]) -> Image.Image:
    shrunk = picture.copy()
    shrunk.thumbnail(room, Image.Resampling.LANCZOS)
    return shrunk
