"""S3 through s3fs: what a store asks of it, each request once and for a limited time."""

import errno
import hashlib
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.errors import InputError
from pipelines.storage import objects
from pipelines.storage.objects import Object
from pipelines.storage.patience import store_code

if TYPE_CHECKING:
    from s3fs import S3FileSystem

CONNECT_SECONDS = 5.0
SILENT_SECONDS = 15.0
"""Without a byte, after which a transfer is given up."""

ANSWER_SECONDS = 30.0
SLOWEST = 64 * 2**10
"""Bytes a second: with `ANSWER_SECONDS` on top, what takes longer is taken for stalled, also where bytes trickle in."""

PAGE_KEYS = 1000
"""Of one page of a listing; S3 gives no more."""


class Page(NamedTuple):
    """A part of a listing; `more` is the token of the next one, None at the end."""

    objects: list[Object]
    more: str | None


class S3:
    """The objects below an address, by their keys. May be used from several threads.

    Every method raises what s3fs raises, an OSError or a TimeoutError for the most part.
    """

    def __init__(self, url: str):
        """
        Raises:
            InputError: s3fs is not installed.
        """
        self._files = _connection(os.getpid())
        self._base = url.partition("://")[2]

    def head(self, key: str) -> Object | None:
        """What is there at a key, if anything."""
        try:
            about = self._ask("head_object", key)
        except FileNotFoundError:
            return None
        if not {"ContentLength", "ETag", "LastModified"} <= set(about):
            raise _unlike_s3()
        encrypted = about.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in about
        return Object(
            key=key,
            size=about["ContentLength"],
            etag=about["ETag"].strip('"'),
            modified=about["LastModified"],
            sha256=about.get("Metadata", {}).get("sha256"),
            has_plain_etag=not encrypted,
        )

    def page(self, prefix: str, token: str | None) -> Page:
        """Some of the objects below a prefix, in the order of their keys: a request takes a thousand at most.

        Args:
            prefix: ends with a slash or is empty.
            token: of the page before; None for the first.
        """
        bucket, _, below = self._base.partition("/")
        below = f"{below}/" if below else ""
        where: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{below}{prefix}", "MaxKeys": PAGE_KEYS}
        if token:
            where["ContinuationToken"] = token
        answer = self._call(self._files._call_s3, "list_objects_v2", **where)
        if "Name" not in answer and "KeyCount" not in answer:
            raise _unlike_s3()
        found = [
            Object(each["Key"].removeprefix(below), each["Size"], each["ETag"].strip('"'), each["LastModified"])
            for each in answer.get("Contents", [])
            if not each["Key"].endswith("/")  # what a console makes of a new folder
        ]
        return Page(found, answer.get("NextContinuationToken") if answer.get("IsTruncated") else None)

    def read(self, key: str, size: int) -> bytes:
        return self._call(self._files._cat_file, self._path(key), seconds=_allowed(size))

    def fetch(self, key: str, file: Path, size: int) -> None:
        self._call(self._files._get_file, self._path(key), str(file), seconds=_allowed(size))

    def send(self, file: Path, key: str, size: int, sha256: str) -> None:
        """Put a file at a key, with its sha256 beside it."""
        self._call(
            self._files._put_file,
            str(file),
            self._path(key),
            chunksize=objects.PART_BYTES,
            seconds=_allowed(size),
            ContentType="application/octet-stream",
            Metadata={"sha256": sha256},
        )

    def write_if(self, key: str, content: bytes, etag: str | None) -> str | None:
        """Put content at a key if what is there has this ETag (None: if nothing is); the new ETag, or None if not.

        Its sha256 goes beside it: where a bucket encrypts, an ETag tells nothing of the content.
        """
        condition: dict[str, Any] = {"IfMatch": f'"{etag}"'} if etag else {"IfNoneMatch": "*"}
        beside = {"sha256": hashlib.sha256(content).hexdigest()}
        try:
            answer = self._ask("put_object", key, Body=content, Metadata=beside, **condition)
        except OSError as error:
            if store_code(error) == "PreconditionFailed" or (etag and store_code(error) == "NoSuchKey"):
                return None
            raise
        if "ETag" not in answer:
            raise _unlike_s3()
        return answer["ETag"].strip('"')

    def remove(self, key: str) -> None:
        """Delete an object; that there is none is no error."""
        self._ask("delete_object", key)

    def _path(self, key: str) -> str:
        return f"{self._base}/{key}" if key else self._base

    def _ask(self, request: str, key: str, **parameters: Any) -> dict[str, Any]:
        """One of S3's own requests."""
        bucket, name, _ = self._files.split_path(self._path(key))
        return self._call(self._files._call_s3, request, Bucket=bucket, Key=name, **parameters)

    def _call(self, method: Callable[..., Any], *args: Any, seconds: float = ANSWER_SECONDS, **kwargs: Any) -> Any:
        """Run one of s3fs's coroutines for at most so many seconds."""
        from fsspec.asyn import sync

        return sync(self._files.loop, method, *args, timeout=seconds, **kwargs)


def _unlike_s3() -> OSError:
    """Of a proxy's page, or a console's, with which a client finds no fault."""
    return OSError(errno.EPROTO, "what answers there does not answer as S3 does")


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


def _allowed(size: int) -> float:
    return ANSWER_SECONDS + size / SLOWEST
