"""A run belongs to one machine at a time: a lease in the store is to machines what the run's lock is to processes.

The lease is an object that is written under a condition only (S3's If-None-Match and If-Match), with an epoch that
counts its holders. It has no time in it, since no two machines have the same: who wants it looks on for a while, and
takes it over, under the condition that it is still what was seen, where its holder has not written it anew meanwhile.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipelines.durable_files import json_bytes
from pipelines.errors import BusyError, CodecmillError
from pipelines.run_directory import RunDirectory
from pipelines.storage import keys
from pipelines.storage.address import store_url
from pipelines.storage.patience import MissingObject, StoreError, StoreUnavailable
from pipelines.storage.store import Store, open_store

log = logging.getLogger("codecmill.storage")

RENEW_SECONDS = 4.0
LEASE_SECONDS = 20.0
"""For how long a lease that nobody writes anew is looked at before it is taken over."""

LEASE = "lease.json"

_held: dict[Path, "Lease"] = {}
"""The leases of this process, by the folders of their runs."""


class LostLease(CodecmillError):
    """Another machine has taken the run over."""


class Lease:
    """The right to send a run to a store. May be used from several threads.

    Args:
        run: its folder is there, since the holder of its lock alone may ask for the lease.
        lost: called once, from the thread that renews, when another machine has taken the run over.
    """

    def __init__(self, run: RunDirectory, store: Store, lost: Callable[[], None] = lambda: None):
        self._run = run
        self._store = store
        self._key = keys.of_run(run.path.name, LEASE)
        self._lost = lost
        self._etag: str | None = None
        self._epoch = self._beat = 0
        self._has_conditions = True
        self._loss: CodecmillError | None = None
        self._token = uuid4().hex
        self._place = _place_of(run)
        self._lock = threading.Lock()
        self._ending = threading.Event()

    @property
    def epoch(self) -> int:
        """How many holders there have been with this one; 0 before it is taken."""
        return self._epoch

    def confirm(self) -> None:
        """Be sure of the lease at this moment: written anew, or taken where the store was away at first.

        Raises:
            LostLease, BusyError: another machine has it. StoreError: the store does not say.
        """
        with self._lock:
            if self._etag is None and not self._epoch:
                self._take()
            else:
                self._renew()

    @property
    def is_lost(self) -> bool:
        """Whether it was found, without the store being asked now, that another machine has the run."""
        return self._loss is not None

    def must_not_be_lost(self) -> None:
        """Say so, without asking the store, where it was found that another machine has the run.

        Raises:
            LostLease, BusyError: it has.
        """
        if self._loss is not None:
            raise self._loss

    def release(self) -> None:
        """Let others have it at once. Of a lease that is lost, or where the store is away, nothing."""
        self._ending.set()
        with self._lock, suppress(StoreError):
            if self._etag is not None:
                self._store.write_if(self._key, self._content(self._epoch, is_free=True), self._etag)
                self._etag = None

    def keep(self) -> None:
        """Write it anew from time to time, until it is released or lost."""
        while not self._ending.wait(RENEW_SECONDS):
            try:
                self.confirm()
            except StoreError:
                continue  # while nobody can write to the store, nobody takes it over either
            except CodecmillError as error:
                log.warning("%s", error)
                self._loss = error
                self._lost()
                return

    def is_anothers(self) -> bool:
        """Whether another machine holds it and lives: then it is written anew while this looks on.

        Raises:
            StoreError: the store does not say.
        """
        seen, etag = self._read()
        if etag is None or self._may_be_taken(seen):
            return False
        time.sleep(1.5 * RENEW_SECONDS)
        now, newer = self._read()
        return newer not in (None, etag) and not self._may_be_taken(now)

    def _take(self) -> None:
        seen, etag = self._read()
        deadline = time.monotonic() + LEASE_SECONDS
        if etag is not None and not self._may_be_taken(seen):
            log.warning(
                "Run '%s' was last held by process %s on %s: for %.0f s it is looked whether that lives.",
                *(self._run.path.name, seen.get("process"), seen.get("host"), LEASE_SECONDS),
            )
        while etag is not None and not self._may_be_taken(seen) and time.monotonic() < deadline:
            time.sleep(min(1.0, RENEW_SECONDS / 4))
            now, newer = self._read()
            if newer != etag and now.get("epoch") is not None and not now.get("free"):
                raise BusyError(
                    f"Run '{self._run.path.name}' is in use by process {now.get('process')} on {now.get('host')}, says "
                    f"{self._store.address(self._key)}. Wait for it to end, or stop it."
                )
            seen, etag = now, newer
        former = seen.get("epoch")
        epoch = (former if isinstance(former, int) else 0) + 1
        self._etag = self._store.write_if(self._key, self._content(epoch), etag)
        if self._etag is None:
            raise BusyError(
                f"Run '{self._run.path.name}' was taken by another machine at this very moment, says "
                f"{self._store.address(self._key)}. Wait for it to end, or stop it."
            )
        self._epoch = epoch
        self._try_conditions()

    def _try_conditions(self) -> None:
        """Not every store heeds conditions: one that writes under a false one is told of, and looked at instead."""
        self._beat += 1  # other content than what is there: it would be taken for written before
        overwritten = self._store.write_if(self._key, self._content(self._epoch), "0" * 32)
        if overwritten is not None:
            self._has_conditions = False
            self._etag = overwritten
            log.warning(
                "%s takes no conditions (If-Match): two machines that start this run in the same second are not kept "
                "apart.",
                self._store.url,
            )

    def _renew(self) -> None:
        self._beat += 1
        if not self._has_conditions and self._read()[1] != self._etag:
            self._etag = None
        if self._etag is not None:
            self._etag = self._written_anew(self._etag)
        if self._etag is None:
            raise LostLease(
                f"Run '{self._run.path.name}' was taken over by another machine while this one did not answer, says "
                f"{self._store.address(self._key)}. It is stopped here, and nothing more of it is sent. Go on there, "
                "or here once that has ended."
            )

    def _written_anew(self, etag: str) -> str | None:
        written = self._store.write_if(self._key, self._content(self._epoch), etag)
        if written is None:
            seen, newer = self._read()
            if seen.get("token") == self._token:  # an earlier attempt that was given up had been carried out
                return self._store.write_if(self._key, self._content(self._epoch), newer)
        return written

    def _read(self) -> tuple[dict[str, Any], str | None]:
        """What the lease says, and its ETag; None where there is none."""
        try:
            about = self._store.find(self._key)
            content = self._store.read(self._key) if about else b"{}"
        except MissingObject:
            return {}, None
        try:
            value = json.loads(content)
        except ValueError:
            value = {}
        return value if isinstance(value, dict) else {}, about.etag if about else None

    def _may_be_taken(self, seen: dict[str, Any]) -> bool:
        """Whether its holder has let it go, or was a process here: that is dead, since we hold the run's lock."""
        return bool(seen.get("free")) or seen.get("place") == self._place or seen.get("token") == self._token

    def _content(self, epoch: int, is_free: bool = False) -> bytes:
        return json_bytes(
            {
                "epoch": epoch,
                "beat": self._beat,
                "free": is_free,
                "host": socket.gethostname(),
                "process": os.getpid(),
                "place": self._place,
                "token": self._token,
            }
        )


def _place_of(run: RunDirectory) -> str:
    """This machine since it was started, and the folder of the run on it.

    Containers on one machine share what it says of its start, and each may have another volume at the same path.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    folder = run.path.stat()
    return f"{boot} {socket.gethostname()} {run.path.absolute()} {folder.st_dev}:{folder.st_ino}"


def lease_of(run: RunDirectory) -> Lease | None:
    """The lease on a run that this process has, or is to get."""
    return _held.get(run.path.absolute())


def is_at_work_elsewhere(run: RunDirectory) -> bool:
    """Whether another machine works on a run, where the environment names a store.

    Raises:
        StoreError: the store does not say.
    """
    url = store_url()
    return url is not None and Lease(run, open_store(url)).is_anothers()


@contextmanager
def leased(run: RunDirectory) -> Iterator[None]:
    """Hold a run's lease for the duration, where the environment names a store; a training that loses it is stopped.

    Must be called by the holder of the run's lock. Where the store is away, a run that is here is worked on without,
    and nothing of it is sent before the lease is taken.

    Raises:
        BusyError: another machine works on the run. StoreError: nothing of the run is here, and the store fails.
    """
    url = store_url()
    if url is None:
        yield
        return
    lease = Lease(run, open_store(url), lost=run.stop_request.touch)
    try:
        lease.confirm()
    except StoreUnavailable as error:
        if not run.config_file.is_file():
            raise
        log.warning("Going on with what is here of the run: %s", error)
    _held[run.path.absolute()] = lease
    threading.Thread(target=lease.keep, name="lease", daemon=True).start()
    try:
        yield
    finally:
        del _held[run.path.absolute()]
        lease.release()
