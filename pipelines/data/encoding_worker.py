"""Encoding in several processes: what a worker runs, and the pool that feeds it with lines of JSON."""

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from queue import SimpleQueue
from typing import IO, Any, Self, cast

from pipelines.data.encoding import EncodingOrder, encode_sources
from pipelines.errors import CodecmillError
from pipelines.process_lifetime import die_with_parent, parent_environment, with_our_sources
from pipelines.process_memory import keep_freed_memory

log = logging.getLogger("codecmill.shards")

TRIES = 3
"""Of an order whose process is killed each time."""

LONGEST_SECONDS = 6 * 3600.0
"""Of one order: what a library decodes for ever must not hold a run for ever."""


def run_here(orders: Sequence[EncodingOrder]) -> Iterator[int]:
    """Encode in this process; yields the number of sources of each order as it is done."""
    keep_freed_memory()  # a picture after another, megabytes each
    for order in orders:
        encode_sources(order)
        yield len(order.jobs)


def run_in_processes(orders: Sequence[EncodingOrder], workers: int) -> Iterator[int]:
    """Encode in `workers` processes; yields as `run_here`, in the order in which they are done.

    Raises:
        CodecmillError, OSError: as `EncodingProcesses.encode`.
    """
    count = min(workers, len(orders))
    with EncodingProcesses(count) as processes, ThreadPoolExecutor(count) as threads:
        try:
            for done in as_completed([threads.submit(processes.encode, order) for order in orders]):
                yield done.result()
        finally:
            processes.kill()  # before their threads are waited for
            threads.shutdown(cancel_futures=True)


class EncodingProcesses:
    """Processes that encode, for as many threads; they end with the `with` block, or with the thread that opens it.

    Programs of our own, not `multiprocessing`: that would run the user's script again in every worker, and pickle.
    """

    def __init__(self, count: int):
        self._count = count
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._all: list[_Worker] = []
        self._is_over = False

    def __enter__(self) -> Self:
        for _ in range(self._count):
            self._idle.put(self._started())
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for worker in self._all:
            worker.close()

    def kill(self) -> None:
        """End them at once: each thread that waits for one has an error."""
        self._is_over = True
        for worker in self._all:
            worker.kill()

    def encode(self, order: EncodingOrder) -> int:
        """Have the next process that is free encode an order; returns the number of its sources.

        One that is killed is replaced, and its order begun again: what it had encoded is kept.

        Raises:
            CodecmillError: what the process raised, or that it was killed again and again.
            OSError: what the disk told it, such as that it is full; see `pipelines.durable_files.room_for`.
        """
        worker = self._idle.get()
        try:
            for left in reversed(range(TRIES)):
                try:
                    worker.encode(order)
                    break
                except _KilledError as error:
                    if self._is_over or not left:
                        raise
                    log.warning("%s Its work goes on in a new one.", error)
                    worker = self._started()
        finally:
            self._idle.put(worker)
        return len(order.jobs)

    def _started(self) -> "_Worker":
        self._all.append(worker := _Worker())
        return worker


class _KilledError(CodecmillError):
    def __init__(self, code: int):
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        super().__init__(
            f"A process that encodes images {how}. If memory ran out, lower data.workers; what is done is kept."
        )


class _Worker:
    """A process that encodes one order at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.data.encoding_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | with_our_sources() | parent_environment(),
        )
        self._orders = cast("IO[bytes]", self._process.stdin)
        self._answers = cast("IO[bytes]", self._process.stdout)

    def encode(self, order: EncodingOrder) -> None:
        # Where the process has died, the missing answer will tell.
        with suppress(BrokenPipeError):
            self._orders.write(order.model_dump_json().encode() + b"\n")
            self._orders.flush()
        answer = self._answer(order)
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["file"])
        if "error" in answer:
            raise CodecmillError(answer["error"])

    def _answer(self, order: EncodingOrder) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            if not selector.select(LONGEST_SECONDS):
                self.kill()
                raise CodecmillError(
                    f"To encode {len(order.jobs)} images, from {order.jobs[0].path} on, took more than "
                    f"{LONGEST_SECONDS / 3600:g} hours. Look for one that no program can open, and remove it."
                )
        line = self._answers.readline()
        if not line:
            raise _KilledError(self._process.wait())
        return json.loads(line)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self._answers.close()
        with suppress(BrokenPipeError):
            self._orders.close()


def main() -> None:
    """Encode the orders that come in as lines, and answer each with a line."""
    die_with_parent()
    keep_freed_memory()
    for number in (
        signal.SIGINT,
        signal.SIGHUP,
    ):  # Ctrl-C, or no terminal: the parent hears it too, and ends its workers
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(_carry_out(EncodingOrder.model_validate_json(line))), file=answers)


def _carry_out(order: EncodingOrder) -> dict[str, str | int]:
    """Encode an order; returns what went wrong, if something did, so that the parent can raise it."""
    try:
        encode_sources(order)
    except CodecmillError as reason:
        return {"error": str(reason)}
    except OSError as reason:
        if reason.errno is None:  # of a library, not of the system
            raise
        return {"errno": reason.errno, "file": str(reason.filename or order.folder)}  # a write names no file
    return {}


if __name__ == "__main__":
    main()
