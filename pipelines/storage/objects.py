"""What is known of an object and of a file, and whether the one is the other."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pipelines.storage.patience import HalfObject

PART_BYTES = 50 * 2**20
"""What is larger than two of these is sent in such parts, which decides on its ETag."""


@dataclass(frozen=True)
class Object:
    """What a store says of an object.

    Attributes:
        key: below the store's address.
        sha256: what its sender has written beside it; None in a listing, or where others have sent it.
        etag: changes with its content; without quotes.
    """

    key: str
    size: int
    etag: str
    modified: datetime
    sha256: str | None = None
    has_plain_etag: bool = True


@dataclass(frozen=True)
class Digests:
    """Of a file; `etag` is what S3 gives it when it is sent: its MD5, or that of its parts' MD5s."""

    size: int
    sha256: str
    md5: str
    etag: str


def digests(file: Path) -> Digests:
    """Of a file, read once."""
    sha256, md5, parts, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), [], 0
    with file.open("rb") as stream:
        while part := stream.read(PART_BYTES):
            sha256.update(part)
            md5.update(part)
            parts.append(hashlib.md5(part, usedforsecurity=False).digest())
            size += len(part)
    etag = md5.hexdigest()
    if size >= 2 * PART_BYTES:
        etag = f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"
    return Digests(size, sha256.hexdigest(), md5.hexdigest(), etag)


def check_sent(about: Object | None, sent: Digests) -> None:
    """Raise `HalfObject` where a store has something else than what was sent."""
    if about is None:
        raise HalfObject("was not there afterwards")
    if about.size != sent.size:
        raise HalfObject(f"had {about.size} bytes afterwards instead of {sent.size}")
    if about.has_plain_etag and about.etag != sent.etag:
        raise HalfObject(f"had ETag {about.etag} afterwards instead of {sent.etag}")


def check_content(content: bytes, about: Object) -> None:
    """Compare with the sha256 that its sender wrote beside it, or with the ETag where that is an MD5."""
    if about.sha256 is not None:
        found, recorded, what = hashlib.sha256(content).hexdigest(), about.sha256, "sha256"
    elif about.has_plain_etag and "-" not in about.etag:
        found, recorded, what = hashlib.md5(content, usedforsecurity=False).hexdigest(), about.etag, "MD5"
    else:
        raise HalfObject("had no checksum to compare it with")
    if found != recorded:
        raise HalfObject(f"had {what} {found[:16]}... instead of {recorded[:16]}...")
