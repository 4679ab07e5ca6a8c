"""A contender: a program that runs in a process and an environment of its own, and is asked for a round at a time.

The process stays from round to round, so that no round pays for imports; between its rounds it waits for a line.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from infra.bench.process_tree import MachineTime, cpu_seconds, processes_below, resident_mib
from infra.environment import without_servers
from pipelines.errors import CodecmillError

PROJECT = Path(__file__).parents[2]
MEMORY_SECONDS = 0.4
"""Between two looks at a contender's memory: each walks its page tables."""


@dataclass(frozen=True)
class Program:
    """What a contender runs.

    Attributes:
        name: in the report.
        module: in `infra.bench.programs`.
        python: whose environment it runs in.
        cores: that it may use, a count; the first ones. None: all.
    """

    name: str
    module: str
    python: Path
    parameters: Mapping[str, Any]
    cores: int | None = None


@dataclass(frozen=True)
class Measurement:
    """One contender's round.

    Attributes:
        seconds, cpu_seconds: by the clock, and of all its processes.
        count: of what it did, patches or images as a rule.
        memory_mib: peak of its processes' PSS.
        others: CPU seconds that other processes of the machine, or of its host, took meanwhile.
        capacity: CPU seconds that the machine had meanwhile.
        more: what else the program said.
    """

    seconds: float
    cpu_seconds: float
    count: int
    memory_mib: float
    others: float
    capacity: float
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def per_second(self) -> float:
        return self.count / self.seconds

    @property
    def cpu_milliseconds(self) -> float:
        """Of one thing."""
        return 1000 * self.cpu_seconds / self.count


class Contender:
    """A program under way; `measure` has it do a round."""

    def __init__(self, program: Program, log: Path):
        self.program = program
        self._log = log
        with _on_cores(program.cores), log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(program.python), "-m", f"infra.bench.programs.{program.module}", json.dumps(program.parameters)],
                cwd=PROJECT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # Ctrl-C comes here alone, and ends them from here
                env=without_servers() | {"PYTHONPATH": str(PROJECT), "PYTHONWARNINGS": "ignore"},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self.close(patience=0.0 if failure else 10.0)

    def wait_ready(self) -> None:
        """Return when it is prepared.

        Raises:
            CodecmillError: it ended instead; the message has its last words.
        """
        self._answer()

    def measure(self, number: int) -> Measurement:
        """Have it do round `number`.

        Raises:
            CodecmillError: as `wait_ready`.
        """
        process = self._process
        machine, own = MachineTime.now(), self._own_cpu_seconds()
        with _watched_memory(process.pid) as peak:
            with contextlib.suppress(BrokenPipeError):
                print(number, file=process.stdin, flush=True)
            said = self._answer()
        passed, used = MachineTime.now(), self._own_cpu_seconds() - own
        return Measurement(
            seconds=said.pop("seconds"),
            cpu_seconds=said.pop("cpu_seconds"),
            count=said.pop("count"),
            memory_mib=peak[0],
            others=max(0.0, passed.busy - machine.busy - used),
            capacity=passed.total - machine.total,
            more=said,
        )

    def _own_cpu_seconds(self) -> float:
        """Of this process, too, which looks at memory meanwhile."""
        return cpu_seconds(processes_below(self._process.pid)) + time.process_time()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101  # it was opened with a pipe
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            said = "\n".join(self._log.read_text(errors="replace").splitlines()[-12:])
            raise CodecmillError(
                f"The contender '{self.program.name}' ended with {code}, and was not done:\n{said}\n"
                f"All that it said is in {self._log}."
            )
        return json.loads(line)

    def close(self, patience: float) -> None:
        """End it and all that it has started.

        Args:
            patience: seconds that it may take to end by itself; nothing is lost if it does not.
        """
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: S101  # as above
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(patience)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            for each in reversed(processes_below(self._process.pid)):
                with contextlib.suppress(OSError):
                    # What tracks shared memory ends by itself, and removes it first.
                    if b"resource_tracker" not in Path(f"/proc/{each}/cmdline").read_bytes():
                        os.kill(each, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()


@contextmanager
def _on_cores(count: int | None) -> Iterator[None]:
    """What is started meanwhile may use the first `count` cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before if count is None else sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _watched_memory(process: int) -> Iterator[list[float]]:
    """Yields a list whose only value is the peak of the PSS of a process and all below it so far, in MiB."""
    peak, ended = [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(MEMORY_SECONDS):
            peak[0] = max(peak[0], resident_mib(processes_below(process)))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()
        peak[0] = max(peak[0], resident_mib(processes_below(process)))
