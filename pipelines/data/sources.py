"""Which images a run is made of: found by glob, folder or list, paired with masks, and named by their content."""

import codecs
import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from pipelines.config import RunConfig
from pipelines.data.image_files import (
    IMAGE_SUFFIXES,
    ImageFile,
    SetAside,
    as_text,
    files_below,
    is_image_name,
    searching,
)
from pipelines.data.masks import masks_below, pair_masks
from pipelines.errors import InputError
from pipelines.run_directory import Root
from pipelines.storage.address import is_url


@dataclass(frozen=True)
class Sources:
    """What was found: the images in the order of their paths, and what was set aside unread."""

    images: tuple[ImageFile, ...]
    set_aside: tuple[SetAside, ...]


def check_sources(config: RunConfig) -> None:
    """See that there are sources; as `find_sources`, but of what is in a store nothing is fetched, and so not paired.

    Raises:
        InputError: nothing is named or found, or the masks cannot be paired.
    """
    images, masks, root = config.data.images, config.data.masks or "", Root(config.root)
    if not images or not (is_url(images) or is_url(masks)):
        find_sources(config)
        return
    check_images(images, "data.images", root)
    if is_url(masks):
        check_images(masks, "data.masks", root)


def check_images(choice: str, field: str, root: Root) -> None:
    """See that there are images; as `find_images`, but of those in a store none is fetched.

    Raises:
        InputError: nothing was found.
    """
    if is_url(choice):
        from pipelines.data.remote_images import look

        look(choice, field)
    else:
        find_images(choice, field, root)


def find_sources(config: RunConfig) -> Sources:
    """The images that `data.images` names, each with its mask from `data.masks` where it has one; see `find_images`.

    Raises:
        InputError: nothing is named or found, or the masks cannot be paired.
    """
    if not config.data.images:
        raise InputError(
            "data.images is empty: name your images with --data.images 'photos/**/*.png' (a glob), a folder or a "
            ".txt list, or in a file given with --config. `codecmill demo` brings its own."
        )
    masks = config.data.masks
    if not masks:
        return find_images(config.data.images, "data.images", Root(config.root))
    if is_url(masks):
        return _with_remote_masks(config, masks)
    with searching(masks, "data.masks") as folder:
        its_masks = masks_below(folder)
    found = find_images(config.data.images, "data.images", Root(config.root), [folder])
    return replace(found, images=tuple(pair_masks(found.images, its_masks, masks)))


def _with_remote_masks(config: RunConfig, url: str) -> Sources:
    found = find_images(config.data.images, "data.images", Root(config.root))
    masks = find_images(url, "data.masks", Root(config.root))
    if masks.set_aside:  # its image would be trained on as if it had none
        lost = masks.set_aside[0]
        raise InputError(
            f"{len(masks.set_aside)} of the masks cannot be used, such as {lost.path}: {lost.reason}. Put them right."
        )
    are_masks = {mask.path for mask in masks.images}
    images = [image for image in found.images if image.path not in are_masks]
    if not images:
        raise InputError(f"data.masks '{url}' names all that data.images names. Give the masks a prefix of their own.")
    return replace(found, images=tuple(pair_masks(images, masks.images, url)))


def find_images(choice: str, field: str, root: Root, excluded: Sequence[Path] = ()) -> Sources:
    """The images that a glob, a folder, a .txt list or an address in a store (which are fetched) names.

    A folder is searched through all its sub-folders for `IMAGE_SUFFIXES`; so is what a glob matches. Links to files are
    followed, links to folders inside are not. A list (.txt) has one path a line, relative to the list's folder; empty
    lines and lines that begin with '#' do not count. What lies in an `excluded` folder, and what codecmill itself keeps
    under `root`, are no images where they lie below the searched folder.

    Args:
        field: the config's name of the choice, for the messages.

    Raises:
        InputError: nothing was found.
    """
    if is_url(choice):
        from pipelines.data.remote_images import fetch_images

        fetched, failed = fetch_images(choice, field, root)
        return Sources(tuple(fetched), tuple(failed))
    own = [root.shards, root.runs, root.images, root.mlflow_artifacts, root.prefect_home]
    with searching(choice, field) as given:
        candidates = _candidates(given, choice, field)
    images, set_aside = _regular(_outside([*own, *excluded], candidates))
    if not images:
        broken = f" {set_aside[0].path}: {set_aside[0].reason}." if set_aside else ""
        raise InputError(
            f"{field} '{choice}' matches no image (looked for {', '.join(sorted(IMAGE_SUFFIXES))} from "
            f"{Path.cwd()}).{broken} Check the path; quote a glob so that the shell leaves it alone."
        )
    return Sources(tuple(images), tuple(set_aside))


def _outside(folders: list[Path], candidates: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """What is not in any of the folders, unless the search began inside; each with its real path.

    What a folder says of its files is found out once, for it may have a hundred thousand: asking of each file where all
    the folders above it really are would take longer than anything else when there is nothing to do.
    """
    places = [os.path.realpath(folder) for folder in folders]
    real_folder = cache(_real)

    @cache
    def is_own(real_parent: str, parent: str, levels: int) -> bool:
        above = Path(parent).parts
        real, base = Path(real_parent), Path(real_folder(str(Path(*above[: len(above) - levels]))))
        return any(real.is_relative_to(place) and not base.is_relative_to(place) for place in places)

    kept = []
    for path, name in candidates:
        parent, _, last = path.rpartition("/")
        parent = parent or "/"
        plain = last != ".." and not os.path.islink(path)  # noqa: PTH114  # Path's raises where a folder is closed
        real = f"{real_folder(parent).rstrip('/')}/{last}" if plain else _real(path)
        real_parent = real.rpartition("/")[0] or "/"
        if not is_own(real_parent, parent, name.count("/")):
            kept.append((path, name, real))
    return kept


def _real(path: str) -> str:
    """Where a path leads; the path itself where it is none, for it holds a NUL."""
    try:
        return os.path.realpath(path)
    except ValueError:
        return path


def _candidates(given: Path, choice: str, field: str) -> list[tuple[str, str]]:
    """Absolute paths, in their order, and what they are below the folder that is searched."""
    if given.is_dir():
        base = str(given).rstrip("/")
        return [(f"{base}/{name}", name) for name in files_below(given) if is_image_name(name)]
    if given.suffix.lower() == ".txt" and not any(character in choice for character in "*?"):
        return _listed(given, field)
    if given.is_file():
        return [(str(given), given.name)]
    return _globbed(given, field)


def _globbed(pattern: Path, field: str) -> list[tuple[str, str]]:
    parts = pattern.parts
    fixed = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts) - 1)
    base, rest = Path(*parts[:fixed]), Path(*parts[fixed:])
    try:
        matches = sorted(set(base.glob(str(rest))))
    except ValueError as error:
        raise InputError(f"{field} '{pattern}' is no glob: {error}. Use ** alone between slashes.") from error
    _refuse_closed(base, rest)
    found = [path for path in matches if is_image_name(path.name) and not path.is_dir()]
    return [(str(path), str(path.relative_to(base))) for path in found]


def _refuse_closed(base: Path, pattern: Path) -> None:
    """pathlib passes over a folder that may not be read, without a word: a set without its images would be made."""
    for count in range(len(pattern.parts)):
        for folder in base.glob(str(Path(*pattern.parts[:count]))) if count else [base]:
            if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
                raise InputError(f"{folder} cannot be searched for images: {os.strerror(errno.EACCES)}.")


def _listed(file: Path, field: str) -> list[tuple[str, str]]:
    try:
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)  # Windows' editors begin a file with it
    except OSError as error:
        raise InputError(f"{field} '{file}' is a list that cannot be read: {error.strerror}.") from error
    lines = os.fsdecode(content).splitlines()
    entries = dict.fromkeys(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    found = [(file.parent / entry, Path(entry)) for entry in sorted(entries)]
    return [(str(path), name.name if name.is_absolute() else str(name)) for path, name in found]


def _regular(candidates: list[tuple[str, str, str]]) -> tuple[list[ImageFile], list[SetAside]]:
    """Split into regular files, which can be read without waiting, and the rest; the same file counts once."""
    images: list[ImageFile] = []
    set_aside: list[SetAside] = []
    seen: set[str] = set()
    for path, name, real in candidates:
        if real in seen:
            continue
        seen.add(real)
        reason = _unreadable(path)
        if reason is None:
            images.append(ImageFile(path, name))
        else:
            set_aside.append(SetAside(as_text(path), "broken", reason))
    return images, set_aside


def _unreadable(path: str) -> str | None:
    try:
        path.encode()
        mode = os.stat(path).st_mode  # noqa: PTH116
    except UnicodeEncodeError:
        return "its name is not valid UTF-8; rename it"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None if stat.S_ISREG(mode) else "it is no regular file"
