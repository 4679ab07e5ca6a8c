"""Which images a run is made of: found by glob, folder or list, paired with masks, and named by their content."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.config import RunConfig
from pipelines.data.image_files import ImageFile, files_below, is_image_name
from pipelines.data.images import IMAGE_SUFFIXES
from pipelines.data.masks import pair_masks
from pipelines.errors import InputError
from pipelines.run_directory import Root


@dataclass(frozen=True)
class SetAside:
    """A file that gives no sample, and why."""

    path: str
    status: Literal["skipped", "duplicate", "broken"]
    reason: str
    sha256: str | None = None


@dataclass(frozen=True)
class Sources:
    """What was found: the images in the order of their paths, and what was set aside unread."""

    images: tuple[ImageFile, ...]
    set_aside: tuple[SetAside, ...]


def find_sources(config: RunConfig) -> Sources:
    """The images that `data.images` names, each with its mask from `data.masks` where it has one.

    A folder is searched through all its sub-folders for `IMAGE_SUFFIXES`; so is what a glob matches. Links to files are
    followed, links to folders inside are not. A list (.txt) has one path a line, relative to the list's folder; empty
    lines and lines that begin with '#' do not count. Masks, and what codecmill itself keeps under `root`, are no images
    where they lie below the searched folder.

    Raises:
        InputError: nothing was found, or the masks cannot be paired.
    """
    choice = config.data.images
    if not choice:
        raise InputError("No images are named. Name them with --data.images: a glob, a folder or a .txt list.")
    masks = Path(config.data.masks).expanduser() if config.data.masks else None
    root = Root(config.root)
    excluded = [root.shards, root.runs, root.mlflow_artifacts, root.prefect_home] + ([masks] if masks else [])
    images, set_aside = _regular(_outside(excluded, _candidates(choice)))
    if not images:
        broken = f" {set_aside[0].path}: {set_aside[0].reason}." if set_aside else ""
        raise InputError(
            f"data.images '{choice}' matches no image (looked for {', '.join(sorted(IMAGE_SUFFIXES))} from "
            f"{Path.cwd()}).{broken} Check the path; quote a glob so that the shell leaves it alone."
        )
    return Sources(tuple(pair_masks(images, masks) if masks else images), tuple(set_aside))


def _outside(folders: list[Path], candidates: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """What is not in any of the folders, unless the search began inside."""
    places = [os.path.realpath(folder) for folder in folders]
    kept = []
    for path, name in candidates:
        real, base = Path(os.path.realpath(path)), Path(os.path.realpath(Path(*path.parts[: -len(name.parts)])))
        if not any(real.is_relative_to(place) and not base.is_relative_to(place) for place in places):
            kept.append((path, name))
    return kept


def _candidates(choice: str) -> list[tuple[Path, Path]]:
    """Paths and names, in the order of the paths."""
    given = Path(choice).expanduser()
    if given.is_dir():
        return [(path, path.relative_to(given)) for path in files_below(given) if is_image_name(path)]
    if given.suffix.lower() == ".txt" and not any(character in choice for character in "*?"):
        return _listed(given)
    if given.is_file():
        return [(given, Path(given.name))]
    return _globbed(given)


def _globbed(pattern: Path) -> list[tuple[Path, Path]]:
    parts = pattern.parts
    fixed = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts) - 1)
    base, rest = Path(*parts[:fixed]), Path(*parts[fixed:])
    try:
        matches = sorted(set(base.glob(str(rest))))
    except ValueError as error:
        raise InputError(f"data.images '{pattern}' is no glob: {error}. Use ** alone between slashes.") from error
    return [(path, path.relative_to(base)) for path in matches if is_image_name(path) and not path.is_dir()]


def _listed(file: Path) -> list[tuple[Path, Path]]:
    try:
        lines = os.fsdecode(file.read_bytes()).splitlines()
    except OSError as error:
        raise InputError(f"The list of images {file} cannot be read: {error.strerror}.") from error
    entries = dict.fromkeys(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    found = [(file.parent / entry, Path(entry)) for entry in sorted(entries)]
    return [(path, Path(name.name) if name.is_absolute() else name) for path, name in found]


def _regular(candidates: list[tuple[Path, Path]]) -> tuple[list[ImageFile], list[SetAside]]:
    """Split into regular files, which can be read without waiting, and the rest; the same file counts once."""
    images: list[ImageFile] = []
    set_aside: list[SetAside] = []
    seen: set[str] = set()
    for path, name in candidates:
        real = os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        reason = _unreadable(path)
        if reason is None:
            images.append(ImageFile(path.absolute(), name))
        else:
            printable = os.fsencode(path.absolute()).decode(errors="backslashreplace")
            set_aside.append(SetAside(printable, "broken", reason))
    return images, set_aside


def _unreadable(path: Path) -> str | None:
    try:
        str(path).encode()
        mode = path.stat().st_mode
    except UnicodeEncodeError:
        return "its name is not valid UTF-8; rename it"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None if stat.S_ISREG(mode) else "it is no regular file"
