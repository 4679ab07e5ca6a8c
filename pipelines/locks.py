"""Locks on files, by flock: they die with their owner, and say who that is."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pipelines.durable_files import FULL, room_for
from pipelines.errors import BusyError


@contextmanager
def lock(path: Path, what: str, wait: float) -> Iterator[int]:
    """Hold `path` by flock for the duration; yields the descriptor.

    Raises:
        BusyError: another process still holds it after `wait` seconds.
        DiskFullError: there is no room for it.
    """
    deadline = time.monotonic() + wait
    with room_for(path.parent, path.name, 0):
        while (descriptor := _locked(path, what, deadline)) is None:
            path.parent.mkdir(parents=True, exist_ok=True)  # it may have gone with its folder
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(path: Path, what: str, deadline: float) -> int | None:
    """The descriptor of a locked file, in which its owner stands; None where it was deleted while it was waited for."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # who else may use it, the umask says
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise BusyError(
                        f"{what} is in use by process {_said_owner(descriptor)}. Wait for it to end, or stop it."
                    ) from error
                time.sleep(0.1)
        if not is_at(path, descriptor):
            os.close(descriptor)
            return None
        _name_owner(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _name_owner(descriptor: int) -> None:
    """Write who holds a lock into its file, unless the disk is full: whoever makes room there needs locks as well."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
    except OSError as error:
        if error.errno not in FULL:
            raise


def is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at a path, and not one that was deleted since."""
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    return False


def open_to_lock(path: Path) -> int:
    """A descriptor of a file, to be locked exclusively: open for writing, as NFS wants it, where that is allowed.

    Raises:
        OSError: it is gone, or may not even be read.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:  # another user's, on a file system that locks what is open for reading, too
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class Owner(NamedTuple):
    """Who holds a lock, as far as its file says: a process (0 where it does not), and its host."""

    process: int
    host: str

    def __str__(self) -> str:
        return f"{self.process or 'unknown'}" + ("" if self.host in ("", socket.gethostname()) else f" on {self.host}")


def owner(path: Path) -> Owner | None:
    """Who holds `path` by flock right now; None where nobody does, or where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        # Shared and without waiting: whoever wants the lock in this very instant tries again for some time.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _said_owner(descriptor)
    else:
        return None
    finally:
        os.close(descriptor)


def _said_owner(descriptor: int) -> Owner:
    process, _, host = os.pread(descriptor, 300, 0).decode("ascii", "replace").strip().partition(" ")
    return Owner(int(process) if process.isascii() and process.isdecimal() else 0, host)
