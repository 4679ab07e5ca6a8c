"""A store: objects below one address, sent and fetched whole, with a look at what arrived."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.durable_files import room_for, sync_file
from pipelines.errors import CodecmillError, InputError
from pipelines.file_digests import difference
from pipelines.storage import objects
from pipelines.storage.address import checked_url
from pipelines.storage.objects import Digests, Object, check_content, check_sent, digests
from pipelines.storage.patience import HalfObject, patiently

if TYPE_CHECKING:
    from s3fs import S3FileSystem

CONNECT_SECONDS = 5.0
SILENT_SECONDS = 15.0
"""Without a byte, after which a transfer is given up."""

ANSWER_SECONDS = 30.0
SLOWEST = 64 * 2**10
"""Bytes a second: with `ANSWER_SECONDS` on top, what takes longer is taken for stalled, also where bytes trickle in."""

SMALL_BYTES = 2**30
"""The largest object that is read into memory."""


def open_store(url: str) -> "Store":
    """The store at an address.

    Raises:
        InputError: it is no address, or s3fs is not installed.
    """
    return Store(checked_url(url, "The store"), _connection(os.getpid()))


@lru_cache(maxsize=1)
def _connection(process: int) -> "S3FileSystem":
    """One for all stores of a process, which others do not inherit."""
    try:
        from s3fs import S3FileSystem
    except ImportError as error:
        raise InputError(
            "What lies at s3:// needs s3fs, which is not installed: pip install -c requirements.lock -e '.[s3]'"
        ) from error
    files = S3FileSystem(
        # All patience is in one place, pipelines.storage.patience: two that multiply would take half an hour.
        config_kwargs={
            "connect_timeout": CONNECT_SECONDS,
            "read_timeout": SILENT_SECONDS,
            "retries": {"total_max_attempts": 1},
        },
        use_listings_cache=False,
        skip_instance_cache=True,
        max_concurrency=2,
        default_block_size=objects.PART_BYTES,
    )
    files.retries = 1
    return files


class Store:
    """Objects below an address. May be used from several threads."""

    def __init__(self, url: str, files: "S3FileSystem"):
        self.url = url
        self._files = files
        self._base = url.partition("://")[2]

    def address(self, key: str) -> str:
        """The whole address of an object, for people."""
        return f"{self.url}/{key}" if key else self.url

    def find(self, key: str, seconds: float | None = None) -> Object | None:
        """What the store has at a key, if anything.

        Raises:
            StoreError: the store does not say.
        """
        return patiently(self.address(key), "asked for", lambda: self._head(key), seconds)

    def list(self, prefix: str) -> Iterator[Object]:
        """The objects below a prefix, which ends with a slash or is empty, in the order of their keys.

        Raises:
            StoreError: the store does not say.
        """
        where = self._path(prefix)

        def attempt() -> dict[str, Any]:
            return self._call(self._files._find, where, detail=True, seconds=10 * ANSWER_SECONDS)

        for path, about in sorted(patiently(self.address(prefix), "listed", attempt).items()):
            if about["type"] == "file" and not path.endswith("/"):
                key = path.removeprefix(self._base).lstrip("/")
                yield Object(key, about["size"], str(about["ETag"]).strip('"'), about["LastModified"])

    def read(self, key: str) -> bytes:
        """The bytes of a small object, of which the store knows the sha256.

        Raises:
            MissingObject: there is none; StoreError: it cannot be had, or is not what was sent.
        """

        def attempt() -> bytes:
            about = self._head(key)
            if about is None:
                raise FileNotFoundError(key)
            if about.size > SMALL_BYTES:
                raise CodecmillError(f"{self.address(key)} has {about.size} bytes, too many for such an object.")
            content = self._call(self._files._cat_file, self._path(key), seconds=_allowed(about.size))
            if len(content) != about.size:
                raise HalfObject(f"had {len(content)} bytes instead of {about.size}")
            check_content(content, about)
            return content

        return patiently(self.address(key), "read", attempt)

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
        temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}-{threading.get_ident()}")

        def attempt() -> None:
            self._call(self._files._get_file, self._path(key), str(temporary), seconds=_allowed(size))
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
            self._call(
                self._files._put_file,
                str(file),
                self._path(key),
                chunksize=objects.PART_BYTES,
                seconds=_allowed(found.size),
                ContentType="application/octet-stream",
                Metadata={"sha256": found.sha256},
            )
            check_sent(self._head(key), found)

        patiently(self.address(key), "sent", attempt)
        return True

    def write_if(self, key: str, content: bytes, etag: str | None) -> str | None:
        """Write a small object if the one that is there has this ETag (None: if none is there).

        Returns:
            The new object's ETag; None where another is there, or none any more.

        Raises:
            StoreError: it cannot be written.
        """
        bucket, name, _ = self._files.split_path(self._path(key))
        condition: dict[str, Any] = {"IfMatch": f'"{etag}"'} if etag else {"IfNoneMatch": "*"}

        def attempt() -> str | None:
            try:
                written = self._call(
                    self._files._call_s3, "put_object", Bucket=bucket, Key=name, Body=content, **condition
                )
            except OSError as error:
                if _refusal(error) == "PreconditionFailed" or (etag and _refusal(error) == "NoSuchKey"):
                    return self._after_all(key, content)
                raise
            return written["ETag"].strip('"')

        return patiently(self.address(key), "written", attempt)

    def _after_all(self, key: str, content: bytes) -> str | None:
        """The ETag of what is there, if an earlier try has written it and only its answer was lost."""
        found = self._head(key)
        if found is None or found.etag != hashlib.md5(content, usedforsecurity=False).hexdigest():
            return None
        return found.etag

    def remove(self, key: str) -> None:
        """Delete an object; that there is none is no error.

        Raises:
            StoreError: it cannot be deleted.
        """
        bucket, name, _ = self._files.split_path(self._path(key))
        patiently(
            self.address(key),
            "deleted",
            lambda: self._call(self._files._call_s3, "delete_object", Bucket=bucket, Key=name),
        )

    def _has(self, key: str, wanted: Digests) -> bool:
        there = self.find(key)
        return there is not None and (there.size, there.sha256) == (wanted.size, wanted.sha256)

    def _head(self, key: str) -> Object | None:
        bucket, name, _ = self._files.split_path(self._path(key))
        try:
            about = self._call(self._files._call_s3, "head_object", Bucket=bucket, Key=name)
        except FileNotFoundError:
            return None
        encrypted = about.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in about
        return Object(
            key=key,
            size=about["ContentLength"],
            etag=about["ETag"].strip('"'),
            modified=about["LastModified"],
            sha256=about.get("Metadata", {}).get("sha256"),
            has_plain_etag=not encrypted,
        )

    def _unlike_etag(self, key: str, file: Path, size: int) -> str | None:
        """How a file differs from what the store says of an object, as the rest of a sentence."""
        found, about = digests(file), self._head(key)
        if about is None:
            raise FileNotFoundError(key)
        if (found.size, about.size) != (size, size):
            return f"has {found.size} bytes instead of {size}"
        if about.has_plain_etag and "-" not in about.etag and found.md5 != about.etag:
            return f"has MD5 {found.md5[:16]}... instead of {about.etag[:16]}..."
        return None

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}" if key else self._base

    def _call(self, method: Callable[..., Any], *args: Any, seconds: float = ANSWER_SECONDS, **kwargs: Any) -> Any:
        """Run one of s3fs's coroutines for at most so many seconds."""
        from fsspec.asyn import sync

        return sync(self._files.loop, method, *args, timeout=seconds, **kwargs)


def _refusal(error: OSError) -> str:
    """S3's own name of an error."""
    response = getattr(error.__cause__, "response", None)
    return str(response["Error"].get("Code")) if response else ""


def _allowed(size: int) -> float:
    return ANSWER_SECONDS + size / SLOWEST
