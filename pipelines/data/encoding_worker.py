"""Encoding in several processes: what a worker runs, and the pool that feeds it with lines of JSON."""

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import IO, cast

from pipelines.data.encoding import EncodingOrder, encode_sources
from pipelines.errors import CodecmillError
from pipelines.process_lifetime import die_with_parent, parent_environment, with_our_sources
from pipelines.process_memory import keep_freed_memory


def run_here(orders: Sequence[EncodingOrder]) -> Iterator[int]:
    """Encode in this process; yields the number of sources of each order as it is done."""
    keep_freed_memory()  # a picture after another, megabytes each
    for order in orders:
        encode_sources(order)
        yield len(order.jobs)


def run_in_processes(orders: Sequence[EncodingOrder], workers: int) -> Iterator[int]:
    """Encode in `workers` processes, which end with this generator or with the thread that drives it.

    Programs of our own, not `multiprocessing`: that would run the user's script again in every worker, and pickle.

    Raises:
        CodecmillError: what a worker raised, or that one died.
        OSError: what the disk told a worker, such as that it is full; see `pipelines.durable_files.room_for`.
    """
    waiting = list(reversed(orders))
    workers_started = [_Worker() for _ in range(min(workers, len(orders)))]
    try:
        with selectors.DefaultSelector() as selector:
            for worker in workers_started:
                selector.register(worker.answers, selectors.EVENT_READ, worker)
                worker.send(waiting.pop())
            underway = len(workers_started)
            while underway:
                for key, _ in selector.select():
                    worker: _Worker = key.data
                    yield worker.receive()
                    if waiting:
                        worker.send(waiting.pop())
                    else:
                        underway -= 1
    finally:
        for worker in workers_started:
            worker.end()


class _Worker:
    """A process that encodes one order at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.data.encoding_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | with_our_sources() | parent_environment(),
        )
        self._jobs = 0
        self._orders = cast("IO[bytes]", self._process.stdin)
        self.answers = cast("IO[bytes]", self._process.stdout)

    def send(self, order: EncodingOrder) -> None:
        self._jobs = len(order.jobs)
        # Where the process has died, the missing answer will tell.
        with suppress(BrokenPipeError):
            self._orders.write(order.model_dump_json().encode() + b"\n")
            self._orders.flush()

    def receive(self) -> int:
        line = self.answers.readline()
        if not line:
            code = self._process.wait()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise CodecmillError(
                f"A process that encodes images {how}. If memory ran out, lower data.workers; what is done is kept."
            )
        answer = json.loads(line)
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["file"])
        if "error" in answer:
            raise CodecmillError(answer["error"])
        return self._jobs

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self.answers.close()
        with suppress(BrokenPipeError):
            self._orders.close()


def main() -> None:
    """Encode the orders that come in as lines, and answer each with a line."""
    die_with_parent()
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
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
