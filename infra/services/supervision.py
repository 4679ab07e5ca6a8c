"""Keeps the services alive: one that dies is named with its log and started again, and those that need it go on.

Started again, rather than all ended: schedules should go on at night, trainings outlive the absence of any of them, and
all of them find their data again. One that keeps dying has a fault that no start mends, and then the whole ends.
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NoReturn

from flows.cli.services import Service
from pipelines.errors import CodecmillError

MOST_STARTS = 4
WITHIN_SECONDS = 600.0
"""So many starts of one service within so long are its last."""
LOOK_SECONDS = 0.3
PAUSE_SECONDS = 1.0
"""Before another start: what is killed may hold its port or its folder for a moment yet."""


@dataclass
class _Kept:
    start: Callable[[], Service]
    service: Service
    starts: deque[float] = field(default_factory=deque)

    def close(self) -> None:
        self.service.close()


class Supervisor:
    """Starts services, and starts again what dies. As a context, it ends all of them, the last started first."""

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self._stack = ExitStack()

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, *starts: Callable[[], Service]) -> None:
        """Start some together; returns when all of them are ready.

        Raises:
            CodecmillError: one ended, or is not ready in time.
        """
        begun = time.monotonic()
        new = []
        for start in starts:
            new.append(_Kept(start, start(), deque([begun])))
            self._stack.callback(new[-1].close)
        self._kept += new
        for each in new:
            each.service.wait_ready()
            say(f"{each.service.name} is ready after {time.monotonic() - begun:.0f} s")

    def watch(self) -> NoReturn:
        """Look after them for good.

        Raises:
            CodecmillError: one dies again and again, or does not start any more.
        """
        while True:
            for each in self._kept:
                try:
                    each.service.check()
                except CodecmillError as death:
                    self._start_again(each, death)
            time.sleep(LOOK_SECONDS)

    def _start_again(self, kept: _Kept, death: CodecmillError) -> None:
        """Once: where that fails, what it needs may have died, too, and comes first when all are looked at again."""
        begun = time.monotonic()
        while kept.starts and begun - kept.starts[0] > WITHIN_SECONDS:
            kept.starts.popleft()
        if len(kept.starts) >= MOST_STARTS:
            times = f"{len(kept.starts)} starts within {WITHIN_SECONDS / 60:.0f} minutes"
            raise CodecmillError(f"{death}. These were {times}, so all ends.")
        say(f"{death}. It is started again.")
        kept.service.close()
        time.sleep(PAUSE_SECONDS)
        kept.starts.append(begun)
        kept.service = kept.start()
        try:
            kept.service.wait_ready()
        except CodecmillError as next_death:
            say(str(next_death))
            kept.service.close()  # where it only did not answer; whoever looks next finds it ended
        else:
            say(f"{kept.service.name} is ready again after {time.monotonic() - begun:.0f} s")


def say(text: str) -> None:
    """A line for whoever watches; the services' own output is in their logs."""
    print(f"services: {text[:1].upper()}{text[1:]}", file=sys.stderr, flush=True)
