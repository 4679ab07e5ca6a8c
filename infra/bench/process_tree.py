"""CPU time and memory of a process with all below it, and of the whole machine, from Linux's /proc.

The standard library only: the programs that are measured import it too, in whatever environment they run.
"""

import contextlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


def processes_below(process: int) -> list[int]:
    """A process and all its living descendants, also those that have a session of their own."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                children.setdefault(int(_fields(int(entry.name))[1]), []).append(int(entry.name))
    found = [process]
    for each in found:
        found += children.get(each, [])
    return found


def cpu_seconds(processes: list[int]) -> float:
    """CPU seconds of some processes, user and system, with those of their children that have ended."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError):
            total += sum(int(value) for value in _fields(process)[11:15])
    return total / TICKS_A_SECOND


def _fields(process: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on; the name before it may hold anything."""
    return (PROC / str(process) / "stat").read_text(errors="replace").rpartition(")")[2].split()


def resident_mib(processes: list[int]) -> float:
    """Proportional set size (PSS) in MiB: memory that several processes share counts once."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError):
            for line in (PROC / str(process) / "smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total / 1024


@dataclass(frozen=True)
class MachineTime:
    """CPU seconds of the whole machine since it started: those in which something ran, and all."""

    busy: float
    total: float

    @classmethod
    def now(cls) -> "MachineTime":
        values = [int(value) for value in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
        idle = values[3] + values[4]  # waiting for a disk is idle, too; time that a host took away is not
        return cls((sum(values) - idle) / TICKS_A_SECOND, sum(values) / TICKS_A_SECOND)


@dataclass
class Stretch:
    """What this process and all below it use between `with` and its end.

    Attributes:
        seconds: by the clock.
        cpu_seconds: of all processes; those that end before the stretch does must have been waited for.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    _started: tuple[float, float] = field(default=(0.0, 0.0), repr=False)

    def __enter__(self) -> "Stretch":
        self._started = (cpu_seconds(processes_below(os.getpid())), time.perf_counter())
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started[1]
        self.cpu_seconds = cpu_seconds(processes_below(os.getpid())) - self._started[0]
