"""Starting a flow from the command line: a Prefect server beside it, its progress shown, a stop explained."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, TypeVar

from flows.cli.endings import Terminated
from pipelines import status
from pipelines.config import RunConfig
from pipelines.errors import CodecmillError, Interrupted
from pipelines.run_directory import Root, RunDirectory
from pipelines.service_addresses import read_variables
from pipelines.tolerant_reading import exists

if TYPE_CHECKING:
    from tasks.values import CheckpointReference, EvaluationReference, RunSummary, ShardSetReference

T = TypeVar("T")

# Importing Prefect takes seconds and must come after its settings, so each flow is loaded only when it is run.


def create_shards() -> "Callable[[RunConfig], ShardSetReference]":
    from flows.shards import create_shards as flow

    return flow


def training() -> "Callable[[RunConfig], CheckpointReference]":
    from flows.training import training as flow

    return flow


def evaluation() -> "Callable[[RunConfig], EvaluationReference]":
    from flows.evaluation import evaluation as flow

    return flow


def pipeline() -> "Callable[[RunConfig], RunSummary]":
    from flows.pipeline import training_pipeline as flow

    return flow


def run_flow(load: Callable[[], Callable[[RunConfig], T]], config: RunConfig, again: str | None = None) -> T:
    """Run a flow with progress shown and a Prefect server beside it.

    Args:
        again: as of `stops_explained`.

    Raises:
        Unreported: the work is done on disk, and Prefect was away for too long to hear of it.
    """
    from flows.cli.display import shown_progress, tell
    from flows.cli.prefect_server import embedded_prefect, without_heartbeats

    # A log line that does not get through is no error of the work. Where its server is away, Prefect would print one at
    # any moment, without a line's end, into the middle of what the command says.
    logging.raiseExceptions = False
    root = Root(config.root.absolute())
    with stops_explained(root.run(config.name), again):
        if os.environ.get("PREFECT_API_URL"):
            _must_let_us_in(root)
        else:
            tell(f"Starting Prefect's server over {root.prefect_home}")
        with shown_progress(), embedded_prefect(root) as server:
            flow = load()
            if server is not None:
                server.wait_ready()
            try:
                with nullcontext() if server is None else without_heartbeats():
                    return flow(config)
            except Exception as error:
                _raise_what_went_unreported(error)
                raise


def _must_let_us_in(root: Root) -> None:
    """Say that Prefect's server is down or closed before its client does, at length."""
    from pipelines.doctor.servers import barred_from_prefect

    if found := barred_from_prefect():
        raise CodecmillError(f"Prefect's server at {found.text}. {found.remedy}{_without_services(root)}")


def _without_services(root: Root) -> str:
    """The way to do without the servers that services.env names: without one of them a run would fail at its end."""
    if not exists(root.services_file):
        return ""
    named = read_variables(root.services_file)
    servers = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")
    here = [name for name in servers if name in named and os.environ.get(name) == named[name]]
    if not here:
        return ""
    what = "it" if len(here) == 1 else "the servers"
    return f" To work without {what}: {' '.join(f'{name}=' for name in here)} (empty), or remove {root.services_file}."


def _raise_what_went_unreported(error: BaseException | None) -> None:
    """Where Prefect is away for good, its client fails in the end as well: nobody is there to be told of a failure."""
    from tasks.reporting import Unreported

    while error is not None:
        if isinstance(error, Unreported):
            raise error from None
        error = error.__cause__ or error.__context__


REPEAT = "Stopped. What is done is kept, and the same command goes on from there."


def repeat_by_name(name: str) -> str:
    """As `REPEAT`, of a command that may have named its run by the time: then the same again would begin another."""
    return REPEAT.replace("command", f"command with --name {name}")


def _exit_code(stop: BaseException) -> int:
    return stop.exit_code if isinstance(stop, Terminated) else 128 + signal.SIGINT


@contextmanager
def going_on_by_repeating() -> Iterator[None]:
    """Say of Ctrl-C, SIGTERM and SIGHUP that the same command goes on from there."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        raise Interrupted(REPEAT, _exit_code(stop)) from None


@contextmanager
def stops_explained(run: RunDirectory, again: str | None = None) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and SIGHUP into a sentence that says what is saved and how to go on.

    Args:
        again: said of commands that `codecmill resume` does not go on with: it does the rest of a run, which is more
            than a single stage, and nothing of an evaluation on other images.
    """
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        code = _exit_code(stop)
        if again is not None:
            raise Interrupted(again, code) from None
        found = status.run_status(run) if run.config_file.is_file() else None
        if found is None:  # no run, but shards perhaps
            raise Interrupted(REPEAT, code) from None
        saved = f"Saved at step {found.step}." if found.checkpoint else "Stopped before the first checkpoint."
        raise Interrupted(f"{saved} Go on with: {run.command('resume')}", code) from None
