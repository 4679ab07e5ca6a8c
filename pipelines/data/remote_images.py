"""Images that lie in a store: those that are new or have changed are fetched, into `images/` under the root."""

import errno
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from pipelines.data.image_files import IMAGE_SUFFIXES, ImageFile, SetAside, is_image_name
from pipelines.data.waiting import alone
from pipelines.errors import CodecmillError, InputError
from pipelines.progress import Progress, report
from pipelines.run_directory import Root
from pipelines.sealed_json import read_sealed, write_sealed
from pipelines.storage import Object, Store, StoreError, StoreFailed
from pipelines.storage.globbing import matching

AT_ONCE = 8
"""Images that are fetched at the same time."""

LISTING = ".listing.json"
"""In a bucket's folder; written anew by each look at its images."""
LARGEST_LISTING = 2 * 2**30
SAVE_SECONDS = 30.0
"""Between two writings while images are fetched: what a killed process has fetched since is fetched again."""

REFUSED_NAMES = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
"""What a file system says of a path that a store takes for a key."""


def look(url: str, field: str) -> None:
    """See that an address names an image, without fetching any.

    Raises:
        InputError: it names none. StoreError: the store does not say.
    """
    store, _, objects = matching(url)
    if not any(is_image_name(each.key) for each in objects):
        raise _none_found(url, field, store)


def fetch_images(url: str, field: str, root: Root) -> tuple[list[ImageFile], list[SetAside]]:
    """The images that an address names, each in a file of its own, in the order of their keys.

    A file is the object's as long as size, ETag and time of change are those that it was fetched with.

    Raises:
        InputError: it names no image. StoreError: the store fails. CodecmillError: the disk is full.
    """
    store, prefix, objects = matching(url)
    named = [each for each in objects if is_image_name(each.key)]
    if not named:
        raise _none_found(url, field, store)
    folder = root.images / store.url.partition("://")[2]
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_name(f".tmp-{folder.name}.lock"), f"{folder}", len(named), "fetches the same images"):
        listing = _Listing(folder / LISTING)
        failed = dict(_fetch(store, folder, named, listing))
    images = [
        ImageFile(str(folder.absolute() / each.key), each.key.removeprefix(prefix))
        for each in named
        if each.key not in failed
    ]
    return images, [SetAside(store.address(key), "broken", reason) for key, reason in failed.items()]


class _Listing:
    """What the files of a bucket were fetched as: size, ETag and time of change by key. May be deleted at any time."""

    def __init__(self, file: Path):
        self._file = file
        try:
            known, is_sealed = read_sealed(file, LARGEST_LISTING) if file.is_file() else ({}, False)
        except CodecmillError:
            known, is_sealed = {}, False  # damaged: all is fetched again
        self._known: dict[str, list[int | str]] = known if is_sealed else {}
        self._saved = time.monotonic()

    def has(self, each: Object, target: Path) -> bool:
        is_there = target.is_file() and target.stat().st_size == each.size
        return is_there and self._known.get(each.key) == _identity(each)

    def note(self, each: Object) -> None:
        self._known[each.key] = _identity(each)

    def save_in_time(self) -> None:
        """Write it, unless that was done a moment ago."""
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        write_sealed(self._file, {**self._known})
        self._saved = time.monotonic()


def _identity(each: Object) -> list[int | str]:
    return [each.size, each.etag, each.modified.isoformat()]


def _fetch(store: Store, folder: Path, named: list[Object], listing: _Listing) -> Iterator[tuple[str, str]]:
    """Fetch what is not here; yields keys that give no image, each with the reason."""

    keys = {each.key for each in named}

    def fetched(each: Object) -> str | None:
        if not _is_plain(each.key):
            return "its key is no path of a file; rename it"
        if above := _above(each.key, keys):
            return f"its key lies below that of another image, {above}; rename one of them"
        target = folder / each.key
        try:
            if listing.has(each, target):
                return None
            store.fetch(each.key, target, each.size, None)
        except StoreFailed:
            raise
        except StoreError as error:  # of this object: another may be let through
            return str(error)
        except OSError as error:
            if error.errno not in REFUSED_NAMES:
                raise
            return f"it cannot be kept as {target}: {error.strerror}"
        listing.note(each)
        return None

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fetching") as pool:
        try:
            for number, (each, reason) in enumerate(zip(named, pool.map(fetched, named), strict=True), start=1):
                report(Progress("shards", number, len(named), "images", "fetching the sources"))
                listing.save_in_time()
                if reason:
                    yield each.key, reason
        finally:
            pool.shutdown(cancel_futures=True)
            listing.save()


def _is_plain(key: str) -> bool:
    """Whether a key, anybody's choice, is a path below a folder."""
    parts = key.split("/")
    ours = any(part.startswith(".tmp-") or part == LISTING for part in parts)
    return not {"", ".", ".."} & set(parts) and "\0" not in key and not ours


def _above(key: str, keys: set[str]) -> str | None:
    """The key, of those, that would have to be a folder for this one to be a file in it."""
    return next((str(parent) for parent in PurePosixPath(key).parents if str(parent) in keys), None)


def _none_found(url: str, field: str, store: Store) -> InputError:
    return InputError(
        f"{field} '{url}' matches no image (looked for {', '.join(sorted(IMAGE_SUFFIXES))} in {store.url}). Check the "
        "address; quote a glob so that the shell leaves it alone."
    )
