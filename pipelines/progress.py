"""What the work says while it runs; who listens, a live terminal or plain lines, is none of its business."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """How far a stage is.

    Attributes:
        stage: 'shards', 'training', 'evaluation', ...
        done, total: in units of `unit`; a total of 0 means that it is not known.
        unit: 'images', 'steps', ...
        message: what is being done just now, in a few words.
        values: figures worth showing, such as loss and PSNR.
    """

    stage: str
    done: int
    total: int
    unit: str
    message: str = ""
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return 0 < self.total <= self.done


Listener = Callable[[Progress], None]
_listeners: list[Listener] = []


def listen(listener: Listener) -> Callable[[], None]:
    """Hear every report of this process from now on; call what is returned to stop."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def report(progress: Progress) -> None:
    """Tell all listeners."""
    for listener in tuple(_listeners):
        listener(progress)


class Spacing:
    """Which reports are worth a line: of each stage the first, the last, what counts anew, and one now and then.

    Args:
        seconds: at least, between two of a stage that only say how far it is.
        with_messages: so is one that says something new.
    """

    def __init__(self, seconds: float, with_messages: bool = False):
        self._seconds = seconds
        self._with_messages = with_messages
        self._told: dict[str, tuple[float, Progress]] = {}

    def last_told(self, stage: str) -> Progress | None:
        return self._told[stage][1] if stage in self._told else None

    def is_due(self, report: Progress) -> bool:
        told = self._told.get(report.stage)
        if told is None or told[1].unit != report.unit or time.monotonic() - told[0] >= self._seconds:
            return True
        is_news = self._with_messages and report.message not in ("", told[1].message)
        return is_news or (report.is_done and not told[1].is_done)

    def note(self, report: Progress) -> None:
        """Take it for told."""
        self._told[report.stage] = (time.monotonic(), report)
