"""What the work says while it runs; who listens, a live terminal or plain lines, is none of its business."""

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
