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
    """An image as it was found.

    Attributes:
        path: absolute. Text, as all here: a `Path` takes as long to make as a file takes to be asked for.
        name: its path below the searched folder, by which it finds its mask.
        mask: the path of that.
    """

    path: str
    name: str
    mask: str | None = None


@dataclass(frozen=True)
class SetAside:
    """A file that gives no sample, and why."""

    path: str
    status: Literal["skipped", "duplicate", "broken"]
    reason: str
    sha256: str | None = None
    bytes: int | None = None


def is_image_name(path: str) -> bool:
    """Whether the last part of a path ends as pictures do; `.png` alone is a hidden file."""
    stem, dot, suffix = path.rpartition("/")[2].rpartition(".")
    return bool(stem and dot) and f".{suffix.lower()}" in IMAGE_SUFFIXES


def files_below(folder: Path) -> list[str]:
    """The paths below a folder of everything in it but folders, sorted by part; links to folders are not followed.

    Raises:
        InputError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be searched for images: {error.strerror}.") from error

    found: list[str] = []
    for place, _, names in os.walk(folder, onerror=refuse):
        below = Path(place).relative_to(folder)
        found += names if below == Path() else [f"{below}/{name}" for name in names]
    return sorted(found, key=lambda path: path.split("/"))
