"""JSON files that carry their own sha256, so that one changed byte anywhere in them is found.

What others are checked by, such as a checkpoint's manifest, has nobody above it that could name its digest. A seal
finds damage, not forgery: who rewrites a file on purpose can seal it again.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pipelines.durable_files import json_bytes, reason_of, write_bytes
from pipelines.errors import CodecmillError

SEAL = "seal"
LARGEST = 64 * 2**20
"""Bytes. What codecmill seals has a few kB; what is ten thousand times that is another file."""

_BLANK = "0" * 64
_PLACE = re.compile(rb'^  "seal": "([0-9a-f]{64})"', re.MULTILINE)


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a dictionary as readable JSON with one key more, `seal`: the file's sha256 with 64 zeros in its place."""
    blank = json_bytes({**value, SEAL: _BLANK})
    write_bytes(path, json_bytes({**value, SEAL: hashlib.sha256(blank).hexdigest()}))


def read_sealed(path: Path, largest: int = LARGEST) -> tuple[Any, bool]:
    """The value in a JSON file of at most `largest` bytes, without its seal, and whether it has one.

    Raises:
        CodecmillError: the file cannot be read, is no JSON, or a byte of it is not as it was written.
    """
    try:
        if not path.is_file():
            raise CodecmillError(f"{path} cannot be read: there is no such file.")
        if path.stat().st_size > largest:
            raise CodecmillError(
                f"{path} cannot be read: its {path.stat().st_size} bytes are too many for such a file."
            )
        content = path.read_bytes()
        value = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CodecmillError(f"{path} cannot be read: {reason_of(error)}.") from error
    if not isinstance(value, dict) or SEAL not in value:
        return value, False
    if not _holds(content):
        raise CodecmillError(f"{path} was altered after it was written: its seal is not the sha256 of what it holds.")
    return {key: item for key, item in value.items() if key != SEAL}, True


def _holds(content: bytes) -> bool:
    places = list(_PLACE.finditer(content))
    if len(places) != 1:
        return False
    start, end = places[0].span(1)
    return hashlib.sha256(content[:start] + _BLANK.encode() + content[end:]).hexdigest().encode() == places[0][1]
