"""Who is at work under a root: a file each, locked for as long as its owner lives, so that the dead can be told.

A killed process cannot say that it is gone, and what Prefect and MLflow say of it is what it said last. The kernel
lets go of its locks, though: an entry that nobody holds is of a process that was killed.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pipelines.config import Section
from pipelines.durable_files import json_bytes, room_for, sync_folder
from pipelines.locks import is_at, open_to_lock, owner
from pipelines.run_directory import Root


class FlowRun(Section):
    """Prefect's name for what is at work, and where Prefect is."""

    id: str
    run_count: int
    """How often it was started: a retry counts on."""
    api: str | None
    """The address of the server; None where Prefect started one of its own."""
    home: Path
    """Prefect's home, which has the database of such a server."""


class Entry(Section):
    """What somebody is at work on."""

    id: str
    """Names the entry's file."""
    process: int
    run: str | None = None
    """The run under the root, where it is one."""
    flow_run: FlowRun | None = None


@dataclass(frozen=True)
class Claim:
    """An entry whose owner is dead, held by this process: nobody else will put it right meanwhile."""

    entry: Entry
    file: Path

    def settle(self) -> None:
        """Remove it: all is put right."""
        self.file.unlink(missing_ok=True)


LOOK_SECONDS = 0.1
"""Longer than `anyone_dead` holds an entry, by far."""

_signed_in: dict[Path, int] = {}
"""The locks of this process. They are not closed by leaving a block, but by `sign_out` or by the process's end."""


def sign_in(root: Root, entry: Entry) -> None:
    """Hold an entry until `sign_out` or until this process is no more.

    One that a dead owner of the same id has left is taken over; while somebody puts it right, for seconds, this waits.
    """
    file = _file(root, entry.id)
    with room_for(root.attendance, file.name, 0):
        root.attendance.mkdir(parents=True, exist_ok=True)
        # Where Prefect itself retries a flow run, in the same process, that is signed in already and would wait for
        # itself.
        descriptor = _signed_in.get(file) or _locked(file, fcntl.LOCK_EX, is_made=True)
        assert descriptor is not None  # noqa: S101  # it is made where it is missing
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json_bytes(entry.model_dump(mode="json")), 0)
        os.fsync(descriptor)
        sync_folder(root.attendance)
    _signed_in[file] = descriptor


def sign_out(root: Root, id: str) -> None:
    """Remove an entry that this process holds, if it does."""
    file = _file(root, id)
    descriptor = _signed_in.pop(file, None)
    if descriptor is not None:
        file.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def present(root: Root, entry: Entry) -> Iterator[None]:
    """Be at work for the duration."""
    sign_in(root, entry)
    try:
        yield
    finally:
        sign_out(root, entry.id)


def anyone_dead(root: Root) -> bool:
    """Whether somebody was killed whose entry is still there; takes no time and changes nothing."""
    return any(_is_free(file) for file in root.attendance.glob("*.json"))


@contextmanager
def claimed(root: Root) -> Iterator[list[Claim]]:
    """Hold the entries of all who were killed for the duration."""
    claims: list[Claim] = []
    descriptors: list[int] = []
    try:
        for file in sorted(root.attendance.glob("*.json")):
            descriptor = _locked(file, fcntl.LOCK_EX | fcntl.LOCK_NB, is_made=False)
            if descriptor is None:
                continue  # at work, or in the hands of another who puts it right
            descriptors.append(descriptor)
            try:
                claims.append(Claim(Entry.model_validate_json(file.read_bytes()), file))
            except ValidationError:  # killed before it was written: before anything was begun
                file.unlink(missing_ok=True)
        yield claims
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _file(root: Root, id: str) -> Path:
    return root.attendance.absolute() / f"{id}.json"


def _locked(file: Path, how: int, is_made: bool) -> int | None:
    """The descriptor of the locked file, made where it is missing; else None where it is another's or gone."""
    patience = time.monotonic() + LOOK_SECONDS
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644) if is_made else open_to_lock(file)
        except OSError:
            if is_made:
                raise
            return None
        try:
            fcntl.flock(descriptor, how)
            # Whoever had the lock may have removed the file: then there is another one of that name by now, or none.
            if is_at(file, descriptor):
                return descriptor
        except BlockingIOError:
            if time.monotonic() > patience:
                os.close(descriptor)
                return None
            time.sleep(0.01)
        os.close(descriptor)


def _is_free(file: Path) -> bool:
    with suppress(OSError):
        return owner(file) is None and file.exists()
    return False
