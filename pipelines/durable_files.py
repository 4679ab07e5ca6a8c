"""Files that are whole or absent, whatever happens while they are written."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.errors import CodecmillError, DiskFullError, InputError

BLOCK_BYTES = 2**16
"""Of a file that is looked through from its end on, at a time."""


LONGEST_NAME = 200
"""Bytes of a file's name, of the 255 that most file systems allow."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a disk says that has no room, for anybody or for this user."""


@contextmanager
def room_for(folder: Path, what: str, needed: int | Callable[[], int]) -> Iterator[None]:
    """Explain a full disk.

    Args:
        folder: where something is written.
        what: that something, in words.
        needed: its size in bytes, or what estimates it once there is no room; 0 where that is not known.

    Raises:
        DiskFullError: there is no room for it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        estimated = needed if isinstance(needed, int) else needed()
        size = f"{'' if isinstance(needed, int) else 'about '}{estimated:,} bytes" if estimated else "more"
        free = shutil.disk_usage(_existing(folder)).free
        raise DiskFullError(
            f"There is no room in {folder}: {what} needs {size}, and {free:,} bytes are left on its disk. "
            "What was saved before is untouched. Make room there, then go on with: codecmill resume RUN"
        ) from error


@contextmanager
def told_where(path: Path) -> Iterator[None]:
    """Explain that nothing can be written where the user wants it.

    Raises:
        InputError: an OSError came of it, or a device or a pipe is there, which a new file would take the place of.
    """
    try:
        if not path.name:
            raise InputError(f"{path} is a folder. Name a file with -o.")
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise InputError(f"{path} cannot be written: it is no regular file. Name another place with -o.")
        yield
    except OSError as error:
        in_its_way = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "a file is in its way" if in_its_way else error.strerror
        raise InputError(f"{path} cannot be written: {reason}. Name another place with -o.") from error


def write_bytes(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file so that after a crash at any moment it is either whole or as it was before.

    Args:
        mode: whom it lets in from its first moment on, less what the process's umask takes away.

    Raises:
        CodecmillError: the disk is full.
    """
    write_pieces(path, (content,), len(content), mode)


def write_pieces(path: Path, pieces: Iterable[bytes], size: int = 0, mode: int = 0o666) -> None:
    """`write_bytes` of pieces that are not held in memory together.

    Args:
        size: of all of them, in bytes; 0 where that is not known.
    """
    temporary = path.with_name(f".tmp-{short_name(path.name)}-{os.getpid()}")
    with room_for(path.parent, path.name, size):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
                file.writelines(pieces)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def short_name(name: str) -> str:
    """A name, or, where what is put around it would make it too long for a file, its digest."""
    content = os.fsencode(name)
    return name if len(content) <= LONGEST_NAME else hashlib.sha256(content).hexdigest()


def whole_lines(path: Path) -> int:
    """How many bytes the whole lines of a file have: all but a last one that is not written to its end.

    It is read from its end on: a file of a million lines is not held in memory.
    """
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - BLOCK_BYTES)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                return begin + newline + 1
            end = begin
    return 0


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, where there is no file yet; not every file system has hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.absolute().parents) if each.is_dir())


@contextmanager
def built_folder(final: Path) -> Iterator[Path]:
    """Build a folder out of sight; at the end it is renamed to `final`, in place of what lies there.

    Nobody ever sees half of it. Only for the holder of the run's lock: what a killed process left of it is deleted.

    Raises:
        CodecmillError: the disk is full.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(f".tmp-{final.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    building = folder_being_built(final, os.getpid())
    former = final.with_name(f".tmp-{final.name}-former-{os.getpid()}")
    try:
        with room_for(final.parent, final.name, 0):
            building.mkdir()
            yield building
            sync_folder(building)
            if final.exists():
                final.rename(former)
            building.rename(final)
            sync_folder(final.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def folder_being_built(final: Path, process: int) -> Path:
    """Where a process builds a folder by `built_folder`."""
    return final.with_name(f".tmp-{final.name}-{process}")


def json_bytes(value: Any) -> bytes:
    """Readable JSON with sorted keys, so that equal values are equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of `json_bytes`."""
    write_bytes(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        CodecmillError: the file is missing, unreadable or no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CodecmillError(f"{path} cannot be read: {reason_of(error)}.") from error


def reason_of(error: Exception) -> str:
    """Why a file cannot be read, without its name, which whoever says so has said."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def sync_file(path: Path) -> None:
    """Make what was written to a file durable."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
