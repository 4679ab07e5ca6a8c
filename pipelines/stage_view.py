"""A stage as it is seen from its reports: how far, how fast, how long still, and its figures in words."""

import time
from collections import deque
from dataclasses import dataclass, field

from pipelines.progress import Progress

_WINDOW_SECONDS = 60.0
"""Over how long the pace is measured: long enough to be calm, short enough to notice a change."""


@dataclass
class StageView:
    """What is known of one stage.

    Attributes:
        latest: its newest report. A stage may count several things one after the other: images, then shards.
        started, ended: in seconds of the monotonic clock; `ended` is None while it goes on.
    """

    latest: Progress
    started: float
    ended: float | None = None
    origin: int = 0
    """How much was done when it began to count; of a resumed stage not 0."""
    marks: deque[tuple[float, int]] = field(default_factory=deque)
    """When how much was done, over the last minute."""

    @classmethod
    def begun(cls, progress: Progress) -> "StageView":
        now = time.monotonic()
        view = cls(progress, now, origin=progress.done)
        view.marks.append((now, progress.done))
        view._see_end(progress, now)
        return view

    def hear(self, progress: Progress) -> None:
        """Take in a further report."""
        now = time.monotonic()
        if progress.unit != self.latest.unit or progress.done < self.latest.done:
            self.origin = progress.done
            self.marks.clear()
        # The pace counts from the first progress: what comes before it are preparations, too.
        elif self.marks[0][1] == self.origin:
            self.marks.clear()
        self.latest = progress
        self.marks.append((now, progress.done))
        while len(self.marks) > 2 and now - self.marks[0][0] > _WINDOW_SECONDS:
            self.marks.popleft()
        self._see_end(progress, now)

    def _see_end(self, progress: Progress, now: float) -> None:
        self.ended = now if progress.is_done else None

    @property
    def is_done(self) -> bool:
        return self.ended is not None

    def elapsed(self) -> float:
        """Seconds since the stage's first report."""
        return (self.ended if self.ended is not None else time.monotonic()) - self.started

    def left(self) -> float | None:
        """Seconds that it will take still at the pace of the last minute; None while that cannot be told."""
        (start, before), (end, after) = self.marks[0], self.marks[-1]
        if self.latest.total <= 0 or after <= before or end <= start:
            return None
        return max(0.0, (self.latest.total - after) * (end - start) / (after - before) - (time.monotonic() - end))

    def count(self) -> str:
        """`120/2000 steps`, or what is known of it."""
        latest = self.latest
        return f"{latest.done}/{latest.total} {latest.unit}" if latest.total > 0 else f"{latest.done} {latest.unit}"

    def values(self) -> str:
        """The figures in words: `loss 0.0123  PSNR 24.31 dB`."""
        return "  ".join(_figure(name, value) for name, value in self.latest.values.items())


def _figure(name: str, value: float) -> str:
    words = name.replace("_", " ").replace("psnr", "PSNR")
    if "PSNR" in words:
        return f"{words} {value:.2f} dB"
    return f"{words} {value:.0f}" if abs(value) >= 1000 else f"{words} {value:.3g}"


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
