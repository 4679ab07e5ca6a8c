"""Files that look like images, and a folder's files."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.errors import InputError

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".avif", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"}
)
"""What is taken for a picture in a folder; lower case. The content, not the suffix, then says how it is read."""


@dataclass(frozen=True)
class ImageFile:
    """An image as it was found; `name` is its path below the searched folder, by which it finds its mask."""

    path: Path
    name: Path
    mask: Path | None = None


@dataclass(frozen=True)
class SetAside:
    """A file that gives no sample, and why."""

    path: str
    status: Literal["skipped", "duplicate", "broken"]
    reason: str
    sha256: str | None = None
    bytes: int | None = None


def is_image_name(path: Path) -> bool:
    # As `path.suffix`, in a third of its time: a folder may have a hundred thousand files.
    stem, dot, suffix = path.name.rpartition(".")
    return bool(stem and dot) and f".{suffix.lower()}" in IMAGE_SUFFIXES


def files_below(folder: Path) -> list[Path]:
    """Everything but folders below a folder, sorted; links to folders are not followed.

    Raises:
        InputError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be searched for images: {error.strerror}.") from error

    found: list[Path] = []
    for place, _, names in os.walk(folder, onerror=refuse):
        base = Path(place)
        found += [base / name for name in names]
    return sorted(found, key=lambda path: path.parts)
