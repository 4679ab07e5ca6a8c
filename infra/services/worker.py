"""Prefect's worker, whose flow runs save and say how they ended when it is to end, or dies.

`python -m infra.services.worker --pool NAME ...` is `prefect worker start --pool NAME ...`, to be ended by SIGTERM or
Ctrl-C: it waits for the flow runs. It is for containers, which end with their first process, and for workers of your
own; `make services` does the same with its `Worker`.

The worker is killed, not asked: asked to end, Prefect's worker kills its flow runs at once, and says nothing of that to
the server. Bereft of it they save, report a crash, and end (tasks/worker_lifetime.py).
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from flows.cli.services import Service
from infra.services.supervision import say
from pipelines.process_lifetime import adopt_orphans, die_with_parent, parent_environment

GRACE_SECONDS = 30.0
"""How long flow runs may take to end: as long as Prefect gives those that it cancels."""


def main(arguments: Sequence[str]) -> int:
    """Run Prefect's worker until it ends or a signal comes; returns once its flow runs have ended, too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    adopt_orphans()
    os.environ.update(parent_environment())
    command = [sys.executable, "-m", "prefect", "worker", "start", *arguments]
    # A session of its own, so that Ctrl-C comes here alone. Should this process be killed, the worker goes with it.
    worker = subprocess.Popen(command, start_new_session=True, preexec_fn=die_with_parent)
    try:
        return _wait(worker)
    finally:
        worker.kill()
        worker.wait()
        _let_save(_children(os.getpid()))


def _wait(worker: subprocess.Popen[bytes]) -> int:
    """The exit code of a child, 128 + N where signal N has ended it; others that end meanwhile leave no entry."""
    while worker.returncode is None:
        ended, status = os.waitpid(-1, 0)
        if ended == worker.pid:
            worker.returncode = os.waitstatus_to_exitcode(status)
    return worker.returncode if worker.returncode >= 0 else 128 - worker.returncode


def _leave(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


class Worker(Service):
    """A process worker, which starts a process for each flow run."""

    def close(self) -> None:
        """End the worker and its flow runs, which save what they have reached first."""
        flow_runs = _children(self._group)
        if self._group is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._group, signal.SIGKILL)
        try:
            _let_save(flow_runs)
        finally:
            super().close()


def _children(worker: int | None) -> list[int]:
    """A descriptor of each process that one has started and that is there still."""
    numbers: list[str] = []
    for thread in Path(f"/proc/{worker}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            numbers += thread.read_text().split()
    found = []
    for each in numbers:
        with contextlib.suppress(ProcessLookupError):
            found.append(os.pidfd_open(int(each)))
    return found


def _let_save(flow_runs: list[int]) -> None:
    """Return when they have ended; kill those that are there after `GRACE_SECONDS`."""
    if flow_runs:
        say(f"flow runs under way, which save within {GRACE_SECONDS:.0f} s: {len(flow_runs)}")
    left, deadline = set(flow_runs), time.monotonic() + GRACE_SECONDS
    try:
        while left and (seconds := deadline - time.monotonic()) > 0:
            left -= set(select.select(list(left), [], [], seconds)[0])  # readable is one that has ended
        for each in left:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(each, signal.SIGKILL)
    finally:
        for each in flow_runs:
            os.close(each)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
