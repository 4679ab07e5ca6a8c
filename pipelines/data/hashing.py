"""What the sources contain: sha256 of every file, remembered while the file stays as it is."""

import hashlib
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipelines.data.image_files import ImageFile, SetAside
from pipelines.data.sources import Sources
from pipelines.errors import CodecmillError
from pipelines.progress import Progress, report
from pipelines.sealed_json import read_sealed, write_sealed

MAX_FILE_BYTES = 4 * 2**30
"""Larger files are no images that fit in memory, and are not read."""

MAX_CACHE_BYTES = 2 * 2**30
"""Of the cache's file: some ten million images."""

GROUP = 32
"""Files that a thread is given at a time: to give them one by one would take longer than to look them up."""

SETTLED_NS = 2_000_000_000
"""A file changed more recently may change again without its times showing it, so its hash is not remembered."""


@dataclass(frozen=True)
class Source:
    """An image, with its mask if it has one, named by what they contain.

    Attributes:
        sha256: of the image's bytes; with a mask, of both sha256, so that another mask makes another source.
        image_sha256, mask_sha256: of the files' bytes.
        bytes: size of the image's file.
    """

    sha256: str
    path: str
    image_sha256: str
    bytes: int
    mask: str | None = None
    mask_sha256: str | None = None


class HashCache:
    """sha256 of files by (path, size, times, inode), in a JSON file that may be deleted at any time."""

    def __init__(self, file: Path):
        self._file = file
        self._known: dict[str, list[int | str]] = self._read()
        self._fresh: dict[str, list[int | str]] = {}

    def _read(self) -> dict[str, list[int | str]]:
        try:
            known, is_sealed = read_sealed(self._file, MAX_CACHE_BYTES) if self._file.is_file() else ({}, False)
        except CodecmillError:
            return {}  # a damaged cache costs time, nothing else
        return known if is_sealed else {}

    def sha256(self, path: str) -> tuple[str, int]:
        """Hash and size of a file; may be called from several threads.

        Raises:
            OSError: it cannot be read, or is larger than `MAX_FILE_BYTES`.
        """
        about = os.stat(path)  # noqa: PTH116
        if about.st_size > MAX_FILE_BYTES:
            raise OSError(0, f"its {about.st_size} bytes are more than {MAX_FILE_BYTES}")
        identity = [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]
        known = self._known.get(path)
        if isinstance(known, list) and known[:-1] == identity:
            return str(known[-1]), about.st_size
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) > SETTLED_NS:
            self._fresh[path] = [*identity, digest]
        return digest, about.st_size

    def save(self) -> None:
        """Keep what was found for the next time, where we may write there."""
        if self._fresh:
            with suppress(PermissionError):
                write_sealed(self._file, self._known | self._fresh)


def identify(sources: Sources, cache_file: Path, workers: int) -> tuple[list[Source], list[SetAside]]:
    """The distinct sources in the order of their hashes, and the files that are none.

    Of several files with one content the first path stays, one with a mask before one without; the others are
    duplicates.
    """
    cache = HashCache(cache_file)
    set_aside = list(sources.set_aside)
    found: list[Source] = []
    total = len(sources.images)
    groups = [sources.images[start : start + GROUP] for start in range(0, total, GROUP)]
    with ThreadPoolExecutor(workers, thread_name_prefix="hashing") as pool:
        for number, results in enumerate(pool.map(lambda group: [_identify(image, cache) for image in group], groups)):
            for result in results:
                if isinstance(result, Source):
                    found.append(result)
                else:
                    set_aside.append(result)
            report(Progress("shards", min(total, (number + 1) * GROUP), total, "images", "reading the sources"))
    cache.save()
    kept, duplicates = _distinct(found)
    return kept, set_aside + duplicates


def _identify(image: ImageFile, cache: HashCache) -> Source | SetAside:
    read = image.path
    try:
        digest, size = cache.sha256(read)
        if image.mask is None:
            return Source(digest, read, digest, size)
        read = image.mask
        mask_digest, _ = cache.sha256(read)
    except OSError as error:
        what = "" if read == image.path else f"its mask {read}: "
        return SetAside(image.path, "broken", f"{what}{error.strerror or error}")
    both = hashlib.sha256(f"{digest} {mask_digest}".encode()).hexdigest()
    return Source(both, image.path, digest, size, image.mask, mask_digest)


def _distinct(found: Iterable[Source]) -> tuple[list[Source], list[SetAside]]:
    kept: dict[str, Source] = {}
    duplicates: list[SetAside] = []
    for source in sorted(found, key=lambda source: (source.mask is None, source.path)):
        first = kept.setdefault(source.image_sha256, source)
        if first is not source:
            reason = f"the same content as {first.path}"
            duplicates.append(SetAside(source.path, "duplicate", reason, source.sha256, source.bytes))
    return sorted(kept.values(), key=lambda source: source.sha256), duplicates
