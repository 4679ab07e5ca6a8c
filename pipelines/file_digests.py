"""Whether a file is still what was recorded of it, and in what it differs."""

import hashlib
import stat
from collections.abc import Callable
from pathlib import Path

CHUNK = 2**20
Heard = Callable[[int], None]
"""Is told of bytes as they are read."""


def unheard(_: int) -> None:
    """For those who do not want to be told."""


def difference(file: Path, size: int | None, sha256: str | None, heard: Heard = unheard) -> str | None:
    """How a file differs from its recorded size and sha256 (None: not to be looked at), as the rest of a sentence; None
    if it does not. A file of another size is not read, and what is no regular file is not opened: a pipe would never
    end.
    """
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode):
            return "is no regular file"
        if size is not None and about.st_size != size:
            return f"has {about.st_size} bytes instead of {size}"
        return differing(file_sha256(file, heard), sha256) if sha256 is not None else None
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def differing(found: str, recorded: str) -> str | None:
    """The same of two digests."""
    return None if found == recorded else f"was changed: its sha256 is {found[:16]}... instead of {recorded[:16]}..."


def file_sha256(file: Path, heard: Heard = unheard) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            heard(len(chunk))
    return digest.hexdigest()
