"""Progress as plain lines, for a pipe, a file or Prefect's log: the first and last of each stage, some between."""

import threading
from collections.abc import Callable

from pipelines.progress import Progress, Spacing
from pipelines.stage_view import StageView, clock

PLAIN_SECONDS = 5.0
"""Least time between two plain lines of a stage."""


class PlainLines:
    """Listens to progress and writes a line now and then: the first and last of each stage, and some between."""

    def __init__(self, write: Callable[[str], None], seconds: float = PLAIN_SECONDS):
        self._write = write
        self._stages: dict[str, StageView] = {}
        self._spacing = Spacing(seconds)
        self._lock = threading.Lock()

    def __call__(self, report: Progress) -> None:
        with self._lock:
            view = self._stages.get(report.stage)
            if view is None:
                view = self._stages[report.stage] = StageView.begun(report)
            else:
                view.hear(report)
            if self._spacing.is_due(report):
                self._tell(view)

    def close(self) -> None:
        """Write the last report of every stage, where it was held back."""
        with self._lock:
            for stage, view in self._stages.items():
                if self._spacing.last_told(stage) != view.latest:
                    self._tell(view)

    def _tell(self, view: StageView) -> None:
        self._spacing.note(view.latest)
        self._write(plain_line(view))


def plain_line(view: StageView) -> str:
    """A stage in one line: `training 120/2000 steps  6 %  3:12 left  loss 0.0123  PSNR 24.31 dB`."""
    latest, left = view.latest, view.left()
    parts = [f"{latest.stage} {view.count()}"]
    if view.is_done:
        parts.append(f"done in {clock(view.elapsed())}")
    elif latest.total > 0:
        parts.append(f"{100 * latest.done // latest.total} %")
        parts += [f"{clock(left)} left"] if left is not None else []
    return "  ".join(filter(None, [*parts, view.values(), "" if view.is_done else latest.message]))
