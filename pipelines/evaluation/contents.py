"""What lies in an evaluation's folder, by its `evaluation.json`, which is written last; read without tensors."""

import time
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from pipelines.checkpoint_format import FileRecord
from pipelines.errors import CodecmillError, first_fault
from pipelines.file_digests import difference, file_sha256

RESULT = "evaluation.json"
REPORT = "report.html"
TABLE = "metrics.csv"
POINTS = "rate_distortion.csv"
PICTURES = "pictures"

_FILE = r"^([0-9A-Za-z][0-9A-Za-z_-]{0,99}/){0,2}[0-9A-Za-z_]{1,99}\.[a-z]{2,4}$"
FilePath = Annotated[str, StringConstraints(pattern=_FILE)]
"""Of a file below the very folder: somebody else's may name `../../elsewhere`. Only files have a dot, so that none lies
where another needs a folder."""


class Contents(BaseModel):
    """What `evaluation.json` says of its folder."""

    model_config = ConfigDict(frozen=True)

    made: float = Field(ge=0, lt=2**40)
    """When, in seconds since 1970."""
    files: dict[FilePath, FileRecord] = Field(min_length=1)
    """All but itself, by their paths below the folder."""


def contents_of(folder: Path) -> Contents:
    """What `evaluation.json` is to say of a folder to which nothing else will be added."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    records = {
        file.relative_to(folder).as_posix(): FileRecord(bytes=file.stat().st_size, sha256=file_sha256(file))
        for file in files
    }
    return Contents(made=round(time.time(), 3), files=records)


def read_contents(folder: Path) -> Contents:
    """What an evaluation's folder says that it holds.

    Raises:
        CodecmillError: it holds no evaluation, a damaged one, or one that does not name its files.
    """
    file = folder / RESULT
    try:
        return parse_contents(file.read_bytes(), str(file))
    except OSError as error:
        raise CodecmillError(f"{file} cannot be read: {error}.") from error


def parse_contents(content: bytes, source: str) -> Contents:
    """What the bytes of an `evaluation.json` say of its folder.

    Args:
        source: where they are from, for the message.

    Raises:
        CodecmillError: they are damaged, or do not name the files.
    """
    try:
        return Contents.model_validate_json(content)
    except ValidationError as error:
        raise CodecmillError(f"{source} does not say what its folder holds: {first_fault(error)}.") from error


def made_at(folder: Path) -> float:
    """When an evaluation was made, in seconds since 1970: the same on each machine that its files are brought to."""
    try:
        return read_contents(folder).made
    except CodecmillError:  # of an earlier codecmill, which did not say
        return (folder / RESULT).stat().st_mtime


def check_contents(folder: Path, contents: Contents) -> None:
    """Compare the files of an evaluation with what its `evaluation.json` says of them.

    Raises:
        CodecmillError: one is another, or missing.
    """
    for name, record in contents.files.items():
        how = difference(folder / name, record.bytes, record.sha256)
        if how:
            raise CodecmillError(f"{folder / name} {how}.")
