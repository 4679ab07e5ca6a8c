"""Signs of life of each rank, in a file that is looked at from outside: a rank that hangs cannot say so itself."""

import contextlib
import faulthandler
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pipelines.durable_files import room_for

Doing = Literal["warming up", "a step", "validating", "saving"]
Beat = Callable[[int, Doing], None]
"""Say that this rank is alive, at which step, and what it is about to do."""

_LAYOUT = struct.Struct("=qqqqqd")
"""Rank, torchrun's restart, process, step, what it does, seconds of the clock that all processes share."""
WARM_UP_SECONDS, COMPILING_SECONDS = 300.0, 1800.0
"""How long a rank may take to its first step, without and with compilation; or training.hang_timeout if it is more."""
PAUSED_SECONDS = 5.0
"""So long between two looks, which follow each other in a fraction of a second, and it was not the ranks that stood."""
DUMP_SECONDS = 1.0
"""How long ranks may take to write down where each of their threads is."""


def silent(step: int, doing: Doing) -> None:
    """For ranks that nobody watches."""


def open_heartbeat(attempt: Path, rank: int, place: int, restart: int) -> Beat:
    """In a rank: the file of its signs of life, and a SIGUSR1 that has it print the stacks of its threads.

    To be called first of all: importing torch and finding the other ranks may hang as well.

    Args:
        place: among the ranks of this host: when hosts come and go, the next rank at the same place has another number.

    Raises:
        DiskFullError: there is no room for it.
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    file_name = f"heartbeat_{place}"

    def sign(step: int, doing: Doing) -> bytes:
        return _LAYOUT.pack(rank, restart, os.getpid(), step, get_args(Doing).index(doing), time.monotonic())

    with room_for(attempt, file_name, _LAYOUT.size), (attempt / file_name).open("w+b") as file:
        # The first is written: a hole has no room of its own, and where a disk is full, to touch one is SIGBUS.
        file.write(sign(0, "warming up"))
        file.flush()
        memory = mmap.mmap(file.fileno(), _LAYOUT.size)

    def beat(step: int, doing: Doing) -> None:
        # Not by pack_into: that clears all of it first, and who looks in that moment finds a time of zero.
        memory[:] = sign(step, doing)

    return beat


@dataclass(frozen=True)
class Sign:
    """The newest sign of life of a rank."""

    rank: int
    restart: int
    process: int
    step: int
    doing: Doing
    seconds: float
    """For how long there was no newer one, as far as somebody could have seen it."""

    @property
    def state(self) -> str:
        """What the kernel says of the process, in a word: 'stopped', 'sleeping', 'running', ..."""
        try:
            status = Path(f"/proc/{self.process}/stat").read_text()
        except OSError:
            return "gone"
        letter = status.rpartition(")")[2].split()[0]
        return {"T": "stopped", "t": "traced", "D": "waiting for a device", "R": "running", "S": "sleeping"}.get(
            letter, letter
        )

    @property
    def is_stopped(self) -> bool:
        """By a signal or a debugger: whatever it was about to do, it does not do it."""
        return self.state in ("stopped", "traced")


class Watch:
    """Looks at the ranks of an attempt from outside, and kills one that hangs, which ends or restarts them all."""

    def __init__(self, attempt: Path, timeout: float, compiles: bool):
        self._attempt = attempt
        self._timeout = timeout
        self._warm_up = max(timeout, COMPILING_SECONDS if compiles else WARM_UP_SECONDS)
        self._judged: set[int] = set()
        self._looked = self._begun = time.monotonic()
        self._found: list[tuple[int, str]] = []

    def look(self) -> None:
        """Kill the rank that hangs, if one does: a stopped one, else, where all are silent, the one that is so longest.

        Those that only wait for it would end with it. Where nobody could look for long, as when the whole machine or
        container was paused, the ranks could give no sign either: they have as long from now on as they ever have.
        """
        now = time.monotonic()
        if now - self._looked > min(PAUSED_SECONDS, self._timeout / 2):
            self._begun = now
        self._looked = now
        signs = [sign for sign in self._signs() if sign.process not in self._judged]
        hanging = [sign for sign in signs if sign.seconds > self._timeout and sign.is_stopped]
        # Where one has ended, torchrun ends the others.
        if not hanging and signs and all(self._is_silent(sign) and sign.state != "gone" for sign in signs):
            hanging = [max(signs, key=lambda sign: sign.seconds)]
        if not hanging:
            return
        self._judged |= {sign.process for sign in signs}
        for sign in signs:
            _signal(sign.process, signal.SIGUSR1)
        time.sleep(DUMP_SECONDS)
        for sign in hanging:
            sentence = (
                f"Rank {sign.rank} (process {sign.process}, {sign.state}) gave no sign of life for "
                f"{sign.seconds:.0f} s, longer than training.hang_timeout, after it began {_what(sign)}. It was killed."
            )
            self._found.append((sign.restart, sentence))
            _signal(sign.process, signal.SIGKILL)
        # Who warms up has nothing to save, and may wait for the others in libtorch, where no SIGTERM is heard: torchrun
        # would give it 30 s.
        for sign in signs:
            if sign.doing == "warming up":
                _signal(sign.process, signal.SIGKILL)

    @property
    def restart(self) -> int:
        """How often torchrun has started the ranks anew."""
        return max((sign.restart for sign in self._signs()), default=0)

    @property
    def found(self) -> list[str]:
        """A sentence for each rank that was found hanging."""
        return [sentence for _, sentence in self._found]

    def found_of(self, restart: int) -> list[str]:
        """As `found`, since torchrun has started the ranks anew so often."""
        return [sentence for of, sentence in self._found if of == restart]

    def _is_silent(self, sign: Sign) -> bool:
        return sign.seconds > (self._warm_up if sign.doing == "warming up" else self._timeout)

    def _signs(self) -> list[Sign]:
        signs = []
        for file in sorted(self._attempt.glob("heartbeat_*")):
            content = file.read_bytes()
            if len(content) == _LAYOUT.size:
                rank, restart, process, step, doing, seen = _LAYOUT.unpack(content)
                silent_for = self._looked - max(seen, self._begun)
                signs.append(Sign(rank, restart, process, step, get_args(Doing)[doing], silent_for))
        return signs


def _what(sign: Sign) -> str:
    return {
        "warming up": "to warm up",
        "a step": f"step {sign.step + 1}",
        "validating": f"to validate after step {sign.step}",
        "saving": f"to save step {sign.step}",
    }[sign.doing]


def _signal(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)
