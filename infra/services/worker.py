"""Prefect's worker as a service: its flow runs save, and say how they ended, while the servers are there to hear it."""

import contextlib
import os
import select
import signal
import time
from pathlib import Path

from flows.cli.services import Service
from infra.services.supervision import say

GRACE_SECONDS = 30.0
"""How long flow runs may take to end: as long as Prefect gives those that it cancels."""


class Worker(Service):
    """A process worker, which starts a process for each flow run."""

    def close(self) -> None:
        """End the worker and its flow runs, which save what they have reached first.

        It is killed, not asked: asked to end, Prefect's worker kills its flow runs at once, and says nothing of that to
        the server. Bereft of it they save, report a crash, and end (tasks/worker_lifetime.py).
        """
        flow_runs = _children(self._group)
        if self._group is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._group, signal.SIGKILL)
        try:
            if flow_runs:
                say(f"flow runs under way, which save within {GRACE_SECONDS:.0f} s: {len(flow_runs)}")
                _wait(flow_runs)
        finally:
            for each in flow_runs:
                os.close(each)
            super().close()


def _children(worker: int | None) -> list[int]:
    """A descriptor of each process that the worker has started and that is there still."""
    numbers: list[str] = []
    for thread in Path(f"/proc/{worker}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            numbers += thread.read_text().split()
    found = []
    for each in numbers:
        with contextlib.suppress(ProcessLookupError):
            found.append(os.pidfd_open(int(each)))
    return found


def _wait(processes: list[int]) -> None:
    """Return when they have ended; kill those that are there after `GRACE_SECONDS`."""
    left, deadline = set(processes), time.monotonic() + GRACE_SECONDS
    while left and (seconds := deadline - time.monotonic()) > 0:
        left -= set(select.select(list(left), [], [], seconds)[0])  # readable is one that has ended
    for each in left:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(each, signal.SIGKILL)
