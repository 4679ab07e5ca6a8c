"""Sends a training to the store, beside it: the training neither waits for the store nor fails with it."""

import threading
from collections.abc import Callable
from typing import Self

from pipelines.run_directory import RunDirectory
from pipelines.storage import open_store, store_url
from pipelines.storage.sending import Sending

INTERVAL_SECONDS = 2.0
LONGEST_INTERVAL = 60.0
"""Between two attempts; they grow apart while the store is away."""


class Uploading:
    """While the `with` block runs, and once more at its end, the store is brought level with the run directory.

    Without a store in the environment, nothing.
    """

    def __init__(self, directory: RunDirectory, warn: Callable[[str], None]):
        url = store_url()
        self._sending = Sending(directory, open_store(url)) if url else None
        self._by_hand = directory.command("sync")
        self._warn = warn
        self._failures = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="uploading", daemon=True)

    def __enter__(self) -> Self:
        if self._sending:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        if self._sending:
            # A daemon: a second Ctrl-C need not wait for a store that is away. What was not sent is sent next time.
            self._thread.join()

    def _work(self) -> None:
        self._attempt()
        while not self._ending.wait(min(INTERVAL_SECONDS * 2**self._failures, LONGEST_INTERVAL)):
            self._attempt()
        self._attempt()

    def _attempt(self) -> None:
        assert self._sending  # noqa: S101
        try:
            self._sending.send()
            self._failures = 0
        except Exception as error:  # whatever it is, of this disk, say, where it is full: the training goes on
            if not self._failures:
                self._warn(f"The store gets what it is missing later, or by {self._by_hand}: {error}")
            self._failures += 1
