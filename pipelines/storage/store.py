"""A store: objects below one address, sent and fetched whole, with a look at what arrived."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.durable_files import room_for, short_name, sync_file
from pipelines.errors import CodecmillError
from pipelines.file_digests import difference
from pipelines.storage.address import checked_url
from pipelines.storage.objects import Digests, Object, check_content, check_sent, digests
from pipelines.storage.patience import HalfObject, patiently
from pipelines.storage.s3 import S3, Page

SMALL_BYTES = 2**30
"""The largest object that is read into memory."""


def open_store(url: str) -> "Store":
    """The store at an address.

    Raises:
        InputError: it is no address, or s3fs is not installed.
    """
    return Store(checked_url(url, "The store"))


class Store:
    """Objects below an address. May be used from several threads."""

    def __init__(self, url: str):
        self.url = url
        self._s3 = S3(url)

    def address(self, key: str) -> str:
        """The whole address of an object, for people."""
        return f"{self.url}/{key}" if key else self.url

    def find(self, key: str, seconds: float | None = None) -> Object | None:
        """What the store has at a key, if anything.

        Raises:
            StoreError: the store does not say.
        """
        return patiently(self.address(key), "asked for", lambda: self._s3.head(key), seconds)

    def list(self, prefix: str) -> Iterator[Object]:
        """The objects below a prefix, which ends with a slash or is empty, in the order of their keys.

        Raises:
            StoreError: the store does not say.
        """
        page = self._page(prefix, None)
        yield from page.objects
        while page.more:
            page = self._page(prefix, page.more)
            yield from page.objects

    def _page(self, prefix: str, token: str | None) -> Page:
        return patiently(self.address(prefix), "listed", lambda: self._s3.page(prefix, token))

    def read(self, key: str) -> bytes:
        """The bytes of a small object, of which the store knows the sha256.

        Raises:
            MissingObject: there is none; StoreError: it cannot be had, or is not what was sent.
        """

        def attempt() -> bytes:
            about = self._s3.head(key)
            if about is None:
                raise FileNotFoundError(key)
            if about.size > SMALL_BYTES:
                raise CodecmillError(f"{self.address(key)} has {about.size} bytes, too many for such an object.")
            content = self._s3.read(key, about.size)
            if len(content) != about.size:
                raise HalfObject(f"had {len(content)} bytes instead of {about.size}")
            check_content(content, about)
            return content

        return patiently(self.address(key), "read", attempt)

    def read_object(self, key: str) -> dict[str, Any]:
        """The JSON object in a small object.

        Raises:
            MissingObject: there is none; StoreError: it cannot be had. CodecmillError: it holds something else.
        """
        try:
            value = json.loads(self.read(key))
        except (ValueError, RecursionError) as error:
            raise CodecmillError(f"{self.address(key)} is no JSON: {error}.") from error
        if not isinstance(value, dict):
            raise CodecmillError(f"{self.address(key)} holds no object.")
        return value

    def fetch(self, key: str, target: Path, size: int, sha256: str | None, seconds: float | None = None) -> None:
        """Bring an object into a file, which is there only when every byte is as it was recorded.

        Args:
            sha256: as recorded; None where nobody has: it is compared with the MD5 that S3 gives of what it holds, or,
                where it gives none (of parts, or encrypted), by its size and S3's own checksum.
            seconds: how long the store is tried for.

        Raises:
            MissingObject: there is none; DamagedObject: it is another one; StoreUnavailable: the store fails.
            CodecmillError: the disk is full.
        """
        temporary = target.with_name(f".tmp-{short_name(target.name)}-{os.getpid()}-{threading.get_ident()}")

        def attempt() -> None:
            self._s3.fetch(key, temporary, size)
            how = difference(temporary, size, sha256) if sha256 else self._unlike_etag(key, temporary, size)
            if how:
                raise HalfObject(how)

        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with room_for(target.parent, target.name, size):
                patiently(self.address(key), "fetched", attempt, seconds)
                sync_file(temporary)
                temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def send(self, file: Path, key: str, sha256: str | None = None) -> bool:
        """Send a file, unless the store has it already; returns whether it was sent.

        Args:
            sha256: what the file must have; without it, whatever it has.

        Raises:
            DamagedObject: the store has something else afterwards.
            StoreError: it cannot be sent. CodecmillError: the file is not what it should be.
        """
        found = digests(file)
        if sha256 is not None and found.sha256 != sha256:
            raise CodecmillError(f"{file} is not sent: its sha256 is {found.sha256[:16]}..., not {sha256[:16]}....")
        if self._has(key, found):
            return False

        def attempt() -> None:
            self._s3.send(file, key, found.size, found.sha256)
            check_sent(self._s3.head(key), found)

        patiently(self.address(key), "sent", attempt)
        return True

    def write_if(self, key: str, content: bytes, etag: str | None) -> str | None:
        """Write a small object if the one that is there has this ETag (None: if none is there).

        Returns:
            The new object's ETag; None where another is there, or none any more.

        Raises:
            StoreError: it cannot be written.
        """

        def attempt() -> str | None:
            return self._s3.write_if(key, content, etag) or self._after_all(key, content)

        return patiently(self.address(key), "written", attempt)

    def _after_all(self, key: str, content: bytes) -> str | None:
        """The ETag of what is there, if an earlier try has written it and only its answer was lost."""
        found = self._s3.head(key)
        is_it = found is not None and found.sha256 == hashlib.sha256(content).hexdigest()
        return found.etag if found and is_it else None

    def remove(self, key: str) -> None:
        """Delete an object; that there is none is no error.

        Raises:
            StoreError: it cannot be deleted.
        """
        patiently(self.address(key), "deleted", lambda: self._s3.remove(key))

    def has(self, key: str, file: Path) -> bool:
        """Whether the store has at a key what a file has.

        Raises:
            StoreError: the store does not say.
        """
        return self._has(key, digests(file))

    def _has(self, key: str, wanted: Digests) -> bool:
        there = self.find(key)
        return there is not None and (there.size, there.sha256) == (wanted.size, wanted.sha256)

    def _unlike_etag(self, key: str, file: Path, size: int) -> str | None:
        """How a file differs from what the store says of an object, as the rest of a sentence."""
        found, about = digests(file), self._s3.head(key)
        if about is None:
            raise FileNotFoundError(key)
        if (found.size, about.size) != (size, size):
            return f"has {found.size} bytes instead of {size}"
        if about.has_plain_etag and "-" not in about.etag and found.md5 != about.etag:
            return f"has MD5 {found.md5[:16]}... instead of {about.etag[:16]}..."
        return None
