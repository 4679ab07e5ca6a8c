"""The progress of a task in Prefect's log, where it is read on a page and after the fact."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_run_logger

from pipelines.plain_lines import PlainLines
from pipelines.progress import listen

SECONDS = 20.0
"""Least time between two lines of a stage: a night's log stays readable."""


@contextmanager
def logged() -> Iterator[None]:
    """For the duration, tell Prefect's log how far the task is."""
    lines = PlainLines(get_run_logger().info, SECONDS)
    stop = listen(lines)
    try:
        yield
    finally:
        stop()
        lines.close()
