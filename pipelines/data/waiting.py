"""Work that one process does for all: the others wait for it, and say so."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipelines.errors import BusyError
from pipelines.locks import lock
from pipelines.progress import Progress, report

LONGEST_WAIT = 7 * 24 * 3600.0
"""Seconds to wait for another process."""


@contextmanager
def alone(file: Path, what: str, images: int, work: str) -> Iterator[None]:
    """Hold a lock of the shard stage for the duration; where another process has it, wait for that, and report it.

    Args:
        what: is locked, and `work`: what the other process does, in words.
        images: that the stage is about.

    Raises:
        BusyError: it still has it after a week.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(file, what, wait=0.0))
        except BusyError:
            report(Progress("shards", 0, images, "images", f"waiting for another process that {work}"))
            stack.enter_context(lock(file, what, LONGEST_WAIT))
        yield
