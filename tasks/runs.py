"""Hold a run for the length of a flow, known to be at work; no task, since a lock cannot be retried or cached."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipelines import attendance
from pipelines.config import RunConfig
from pipelines.event_log import events
from pipelines.run_directory import Root
from pipelines.runs import check_inputs, start_or_continue
from pipelines.storage.bringing import catch_up, is_in_store
from pipelines.storage.lease import leased
from tasks.dead_runs import put_right_beside
from tasks.values import HeldRun
from tasks.worker_lifetime import end_with_worker

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun, State
    from prefect.flows import Flow


def named(config: RunConfig) -> RunConfig:
    """A config with its run's name filled in from the flow run's scheduled start and id, so that a retry keeps it."""
    from prefect.runtime import flow_run

    return config.named(flow_run.scheduled_start_time, flow_run.id)


def is_first_try() -> bool:
    """Whether this flow run is no retry."""
    from prefect.runtime import flow_run

    return flow_run.run_count <= 1


def begun(config: RunConfig) -> RunConfig | None:
    """The config that a run of this name was begun with; None where there is none yet."""
    run = Root(config.root.absolute()).run(config.name)
    if not run.config_file.is_file():
        return None
    return run.read_config().model_copy(update={"root": config.root})  # a relative one may have been another folder's


def flow_run_name() -> str:
    """What Prefect calls a flow run: the flow and the run that it works on."""
    from prefect.runtime import flow_run

    return f"{flow_run.flow_name} {named(RunConfig.model_validate(flow_run.parameters['config'])).name}"


def flow_run_page(root: Root) -> str | None:
    """Prefect's page of this flow run; None where its server lives beside this command, without pages."""
    from prefect.runtime import flow_run
    from prefect.settings import PREFECT_HOME
    from prefect.utilities.urls import url_for

    if PREFECT_HOME.value().absolute() == root.prefect_home.absolute():
        return None
    return url_for("flow-run", str(flow_run.id))


def at_work(config: RunConfig, run: str | None = None) -> None:
    """Leave word that this flow run is at work, until Prefect has heard how it ended, and see to those that died.

    Args:
        run: the name of the run that it works on, where it is one.
    """
    from prefect.runtime import flow_run
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME

    root = Root(config.root.absolute())
    identity = attendance.FlowRun(
        id=str(flow_run.id),
        run_count=flow_run.run_count,
        api=PREFECT_API_URL.value(),
        home=PREFECT_HOME.value(),
    )
    entry = attendance.Entry(id=identity.id, process=os.getpid(), run=run, flow_run=identity)
    attendance.sign_in(root, entry)
    end_with_worker(identity.id)
    put_right_beside(root)


def has_ended(flow: "Flow[..., object]", flow_run: "FlowRun", state: "State[object]") -> None:
    """A hook of each flow: Prefect knows how the flow run ended, so whoever dies from now on leaves nothing behind."""
    try:
        config = RunConfig.model_validate(flow_run.parameters["config"])
    except ValidationError:  # what the flow run failed by: nobody has signed in
        return
    attendance.sign_out(Root(config.root.absolute()), str(flow_run.id))


HOOKS: dict[str, Any] = {"on_completion": [has_ended], "on_failure": [has_ended], "on_crashed": [has_ended]}


@contextmanager
def held(config: RunConfig) -> Iterator[HeldRun]:
    """Start or continue the run that a config names, and hold it alone; where a store knows more of it, from there.

    Raises:
        StoreError: nothing of the run is here, and the store fails.
        BusyError: another process holds it, here or on another machine that uses the same store.
        InputError: it exists with settings that cannot change.
    """
    config = named(config)
    at_work(config, config.name)
    run = Root(config.root.absolute()).run(config.name)
    with run.locked() as lock, leased(run):
        catch_up(run)
        check_inputs(config)
        path = start_or_continue(config).path
        with events(run):
            yield HeldRun(path=path, lock=lock)


@contextmanager
def held_as_it_is(config: RunConfig) -> Iterator[HeldRun]:
    """Hold the run that a config names alone, and leave its settings as they are; where a store knows more of it, from
    there.

    Raises:
        StoreError: nothing of the run is here, and the store fails.
        BusyError: another process holds it, here or on another machine that uses the same store.
        InputError: there is no such run, neither here nor in the store.
    """
    config = named(config)
    root = Root(config.root.absolute())
    run = root.run(config.name)
    if not run.config_file.is_file() and not is_in_store(config.name):
        root.existing_run(config.name)  # says which there are
    at_work(config, config.name)
    with run.locked() as lock, leased(run):
        catch_up(run)
        with events(run):
            yield HeldRun(path=run.path, lock=lock)
