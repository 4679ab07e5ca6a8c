"""The shards of a set that lies in a store: fetched into the set's folder, verified, and evicted within a bound.

Several processes share the folder. Whoever reads a tar holds a shared lock on it, which dies with its owner; only who
gets it alone may evict it, so that what is open stays. What is fetched gets its name when its sha256 is the manifest's.
"""

import fcntl
import os
import re
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.data.shard_format import ShardRow, is_whole
from pipelines.errors import BusyError, CodecmillError, InputError
from pipelines.locks import lock, open_to_lock
from pipelines.storage import Store, open_store

CACHE_BYTES = "CODECMILL_CACHE_BYTES"
"""Of the environment: what this machine keeps of each shard set that lies in a store, in bytes of tars."""

DEFAULT_BYTES = 64 * 2**30

PATIENCE_SECONDS = 240.0
"""How long a shard that a training waits for is asked for; less than after what a rank counts as hung."""

LONGEST_WAIT = 2 * PATIENCE_SECONDS
"""Seconds for another process that fetches the same shard."""


def cache_bytes() -> int:
    """The bound that the environment names, else `DEFAULT_BYTES`.

    Raises:
        InputError: it names no number of bytes.
    """
    named = os.environ.get(CACHE_BYTES, "").strip()
    if named and not re.fullmatch(r"[1-9][0-9]{0,17}", named):
        raise InputError(f"{CACHE_BYTES} is '{named}', which is no number of bytes such as 68719476736.")
    return int(named) if named else DEFAULT_BYTES


JUST_USED_NS = 1_000_000_000
"""How exactly the time of a shard's last use, which is that of its change, is kept: to note each read costs as much as
the read."""


class ShardCache:
    """What is here of a set, and the way to the rest. May be used from several threads.

    Args:
        limit: bytes of tars; indexes and lists of sources, a thousandth of them, stay.
    """

    def __init__(self, folder: Path, url: str, rows: Collection[ShardRow], limit: int):
        self.folder = folder
        self.limit = limit
        self.needed: Mapping[str, int] = {}
        """Names of the shards that the next samples are read from, which are evicted last, and how many windows from
        now they are: the most distant go first."""
        self._url = url
        self._bytes = {row.name: row.bytes for row in rows}
        self.largest = max(self._bytes.values(), default=0)
        if self.largest > limit:
            raise InputError(
                f"{CACHE_BYTES} is {limit}, but a shard of {folder} has {self.largest} bytes. Set it higher."
            )

    def is_here(self, row: ShardRow) -> bool:
        return is_whole(self.folder / row.tar, row.bytes)

    def small(self, name: str, size: int, sha256: str) -> Path:
        """An index or list of sources, fetched if it is not here.

        Raises:
            StoreError: it cannot be had.
        """
        file = self.folder / name
        if not is_whole(file, size):
            with self._one_at_a_time(name, LONGEST_WAIT):
                if not is_whole(file, size):
                    self._store().fetch(name, file, size, sha256, PATIENCE_SECONDS)
        return file

    def hold(self, row: ShardRow) -> int:
        """A descriptor of a shard's tar, which is not evicted while that is open.

        Raises:
            StoreError: it cannot be had. NoRoomError: for long there was no room for it within the bound.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (descriptor := self._held(row)) is None:
            try:
                self.bring(row)
            except NoRoomError:  # others read, or fetch, as much as may be here
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        return descriptor

    def bring(self, row: ShardRow, wait: float = LONGEST_WAIT, spared: Collection[str] = ()) -> None:
        """Fetch a shard that is not here.

        Args:
            wait: seconds for another process that fetches it.
            spared: names of shards that are not evicted for it.

        Raises:
            BusyError: another process fetches it still. NoRoomError: within the bound there is no room for it.
            StoreError: it cannot be had.
        """
        with self._one_at_a_time(row.tar, wait):
            if not self.is_here(row):
                with self._claimed(row, spared):
                    self._store().fetch(row.tar, self.folder / row.tar, row.bytes, row.sha256, PATIENCE_SECONDS)

    def discard(self, row: ShardRow) -> None:
        """Take away a shard that was found to be damaged; it is fetched anew when it is wanted."""
        for name, _, _ in row.files():
            (self.folder / name).unlink(missing_ok=True)

    def _held(self, row: ShardRow) -> int | None:
        """A locked descriptor of a tar that is here and whole."""
        try:
            descriptor = os.open(self.folder / row.tar, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        about = os.fstat(descriptor)
        if about.st_nlink and about.st_size == row.bytes:
            if time.time_ns() - about.st_mtime_ns > JUST_USED_NS:
                with suppress(OSError):
                    os.utime(descriptor)
            return descriptor
        os.close(descriptor)
        if about.st_nlink:
            (self.folder / row.tar).unlink(missing_ok=True)
        return None

    @contextmanager
    def _one_at_a_time(self, name: str, wait: float) -> Iterator[None]:
        """Fetch a file in one process only; what a killed one has left of it is deleted."""
        with lock(self.folder / f".tmp-{name}.lock", f"{self.folder / name}", wait):
            for leftover in self.folder.glob(f".tmp-{name}-*"):
                leftover.unlink(missing_ok=True)
            yield

    @contextmanager
    def _claimed(self, row: ShardRow, spared: Collection[str]) -> Iterator[None]:
        """Make room for a tar and keep it free until that is here."""
        claim = self.folder / f".tmp-{row.tar}-claim"
        with lock(self.folder / ".tmp-room.lock", f"{self.folder}", LONGEST_WAIT):
            self._make_room(row, spared)
            claim.touch()
        try:
            yield
        finally:
            claim.unlink(missing_ok=True)

    def _make_room(self, wanted: ShardRow, spared: Collection[str]) -> None:
        """Evict what was used least recently; what is needed next only where nothing else is left, its end first."""
        needed = self.needed
        # Claims first: one that ends meanwhile has left its tar by then; the other way round it would be in neither.
        claimed = self._being_fetched()
        here: dict[str, int] = {}
        for name in self._bytes:
            with suppress(FileNotFoundError):
                here[name] = (self.folder / f"{name}.tar").stat().st_mtime_ns
        used = sum(self._bytes.get(name, 0) for name in {*here, *claimed} - {wanted.name})
        candidates = sorted(
            (name for name in here if name != wanted.name and name not in spared),
            key=lambda name: (name in needed, -needed.get(name, 0), here[name]),
        )
        for name in candidates:
            if used + wanted.bytes <= self.limit:
                return
            if _evicted(self.folder / f"{name}.tar"):
                used -= self._bytes[name]
        if used + wanted.bytes > self.limit:
            raise NoRoomError(
                f"{self.folder / wanted.tar} has no room in the cache of {self.limit} bytes: {used} bytes of it are in "
                f"use. Set {CACHE_BYTES} higher."
            )

    def _being_fetched(self) -> set[str]:
        """Names of the shards that room is kept free for; what killed processes have left of others is deleted."""
        claimed = {file.name.removeprefix(".tmp-").partition(".tar-")[0] for file in self.folder.glob(".tmp-*.tar-*")}
        for name in list(claimed):
            with suppress(BusyError), self._one_at_a_time(f"{name}.tar", wait=0):
                claimed.remove(name)
        return claimed

    def _store(self) -> Store:
        return open_store(self._url)


class NoRoomError(CodecmillError):
    """All that is in the cache is in use."""


def _evicted(file: Path) -> bool:
    """Delete a tar, unless somebody has it open."""
    try:
        descriptor = open_to_lock(file)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)
