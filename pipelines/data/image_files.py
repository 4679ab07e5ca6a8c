"""Files that look like images, and a folder's files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
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


def as_text(path: str) -> str:
    """A path as text that can be written down, whatever its bytes are."""
    return os.fsencode(path).decode(errors="backslashreplace")


@contextmanager
def searching(choice: str, field: str) -> Iterator[Path]:
    """Look for what a choice names, by a path that is yielded: absolute, and with a home for its `~`.

    Raises:
        InputError: there is no such home, or the file system refuses the path.
    """
    try:
        place = Path(choice).expanduser().absolute()
    except RuntimeError as error:  # pathlib's word for it
        raise InputError(f"{field} '{choice}' is in the home of a user unknown here. Write the path out.") from error
    try:
        yield place
    except OSError as error:
        raise InputError(
            f"{field} '{choice}' cannot be searched: {error.strerror}. Check the path, and whether you may read it."
        ) from error


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
