"""Sends what a training writes to MLflow, beside it: the training neither waits for MLflow nor fails with it."""

import threading
from collections.abc import Callable
from typing import Self

from pipelines import tracking
from pipelines.errors import CodecmillError, Interrupted
from pipelines.run_directory import RunDirectory
from pipelines.storage.lease import lease_of

INTERVAL_SECONDS = 5.0
LONGEST_INTERVAL_SECONDS = 160.0
"""After failures: what a server never takes, a checkpoint too large for it, is read and sent at each attempt."""


class Shipping:
    """While the `with` block runs, and once more at its end, MLflow is brought level with the run directory."""

    def __init__(self, directory: RunDirectory, warn: Callable[[str], None]):
        self._directory = directory
        self._warn = warn
        self._warned = False
        self._begun = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="shipping", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ending.set()
        # A daemon: a second Ctrl-C need not wait for a server that is away. What was not sent is sent next time.
        self._thread.join()
        stopped = kind is not None and (issubclass(kind, Interrupted) or not issubclass(kind, Exception))
        status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        lease = lease_of(self._directory)
        if lease is None or not lease.is_lost:  # else it is at work on another machine, which says how it is
            self._attempt(lambda: tracking.set_status(self._directory, status))
        self._attempt(lambda: tracking.release(self._directory))

    def _work(self) -> None:
        interval = INTERVAL_SECONDS
        self._attempt(self._send)
        while not self._ending.wait(interval):
            self._attempt(self._send)
            interval = min(2 * interval, LONGEST_INTERVAL_SECONDS) if self._warned else INTERVAL_SECONDS
        self._attempt(lambda: self._send(told=True))

    def _send(self, told: bool = False) -> None:
        if not self._begun:
            tracking.begin(self._directory)
            self._begun = True
        tracking.sync(self._directory, told)

    def _attempt(self, send: Callable[[], object]) -> None:
        try:
            send()
            self._warned = False
        except Exception as error:  # whatever a client of MLflow's raises: the training goes on
            if not self._warned:
                kind = "" if isinstance(error, CodecmillError) else f"unexpected {type(error).__name__}: "
                self._warn(f"MLflow gets what it is missing later: {kind}{error}")
            self._warned = True
