"""A run's log for machines: `logs/events.jsonl`, an object a line with run, stage, rank and step, whoever writes it.

What people read, a terminal and Prefect's log, is told elsewhere; this is the same in a form that can be searched.
"""

import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from pipelines.progress import Progress, Spacing, listen
from pipelines.run_directory import RunDirectory

LOGGER = "codecmill"
SECONDS = 10.0
"""Least time between two events of one stage that only say how far it is."""


class EventLog(logging.Handler):
    """Appends events: log records below `codecmill`, progress, and what `write` is given.

    Several processes append to one file, each event in one write, so that no two get mixed.

    Args:
        rank: of a process of the training; None for the one that looks after the whole.
    """

    def __init__(self, run: RunDirectory, rank: int | None = None):
        super().__init__(logging.INFO)
        self._run = run.path.name
        self._rank = rank
        self._spacing = Spacing(SECONDS, with_messages=True)
        self._hearing = threading.Lock()
        run.events.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(run.events, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(
        self,
        message: str,
        level: str = "info",
        stage: str | None = None,
        step: int | None = None,
        values: Mapping[str, float] | None = None,
    ) -> None:
        """Append an event; on a full disk it is left out, for a log is no reason to fail."""
        event = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "level": level,
            "run": self._run,
            "stage": stage,
            "rank": self._rank,
            "step": step,
            "message": message,
            **({"values": dict(values)} if values else {}),
        }
        with suppress(OSError):
            os.write(self._file, json.dumps(event).encode() + b"\n")

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stage = record.name.partition(".")[2] or None
            self.write(record.getMessage(), record.levelname.lower(), stage, getattr(record, "step", None))
        except Exception:  # as every handler does
            self.handleError(record)

    def hear(self, progress: Progress) -> None:
        """Take in a report; of many that only count, one now and then."""
        with self._hearing:
            if not self._spacing.is_due(progress):
                return
            self._spacing.note(progress)
        text = f"{progress.done} of {progress.total} {progress.unit}" + f"  {progress.message}".rstrip()
        step = progress.done if progress.unit == "steps" else None
        self.write(text, stage=progress.stage, step=step, values=progress.values)

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._file)
        super().close()


@contextmanager
def events(run: RunDirectory, rank: int | None = None) -> Iterator[EventLog]:
    """For the duration, this process's log records, progress and exceptions are events of a run.

    A rank reports no progress: whoever follows the ranks does.
    """
    log = EventLog(run, rank)
    logger = logging.getLogger(LOGGER)
    former = logger.level
    logger.addHandler(log)
    logger.setLevel(logging.INFO)
    stop = listen(log.hear) if rank is None else lambda: None
    try:
        yield log
    except BaseException as error:
        # Of signals and Ctrl-C, which are no Exceptions, most have no text.
        text = str(error) or ("no more is known" if isinstance(error, Exception) else "stopped from outside")
        log.write(f"{type(error).__name__}: {text}", "error")
        raise
    finally:
        stop()
        logger.removeHandler(log)
        logger.setLevel(former)
        log.close()
