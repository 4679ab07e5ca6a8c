"""Hold a run for the length of a flow; no task, since a lock cannot be retried or cached."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

from pipelines.config import RunConfig
from pipelines.run_directory import Root
from pipelines.runs import start_or_continue
from tasks.values import HeldRun


def scheduled_start() -> datetime | None:
    """When this flow run was to start: a retry fills `{date}` in a run's name with the same day."""
    from prefect.runtime import flow_run

    return flow_run.scheduled_start_time


@contextmanager
def held(config: RunConfig) -> Iterator[HeldRun]:
    """Start or continue the run that a config names, and hold it alone.

    Raises:
        BusyError: another process holds it.
        InputError: it exists with settings that cannot change.
    """
    config = config.named(scheduled_start())
    with Root(config.root.absolute()).run(config.name).locked() as lock:
        yield HeldRun(path=start_or_continue(config).path, lock=lock)


@contextmanager
def held_as_it_is(config: RunConfig) -> Iterator[HeldRun]:
    """Hold the run that a config names alone, and leave its settings as they are.

    Raises:
        BusyError: another process holds it.
        InputError: there is no such run.
    """
    run = Root(config.root.absolute()).existing_run(config.name)
    with run.locked() as lock:
        yield HeldRun(path=run.path, lock=lock)
