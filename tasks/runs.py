"""Hold a run for the length of a flow; no task, since a lock cannot be retried or cached."""

from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.config import RunConfig
from pipelines.run_directory import Root
from pipelines.runs import start_or_continue
from tasks.values import HeldRun


def named(config: RunConfig) -> RunConfig:
    """A config with its run's name filled in from the flow run's scheduled start and id, so that a retry keeps it."""
    from prefect.runtime import flow_run

    return config.named(flow_run.scheduled_start_time, flow_run.id)


def flow_run_name() -> str:
    """What Prefect calls a flow run: the flow and the run that it works on."""
    from prefect.runtime import flow_run

    return f"{flow_run.flow_name} {named(RunConfig.model_validate(flow_run.parameters['config'])).name}"


@contextmanager
def held(config: RunConfig) -> Iterator[HeldRun]:
    """Start or continue the run that a config names, and hold it alone.

    Raises:
        BusyError: another process holds it.
        InputError: it exists with settings that cannot change.
    """
    config = named(config)
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
