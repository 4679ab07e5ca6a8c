"""What `codecmill sync` does: the store and MLflow get what they miss of a run, each for itself."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from flows.cli.display import shown_progress
from pipelines import attendance, tracking
from pipelines.errors import CodecmillError
from pipelines.run_directory import RunDirectory
from pipelines.storage import StoreError, open_store, store_url
from pipelines.storage.bringing import catch_up
from pipelines.storage.lease import leased
from pipelines.storage.sending import Sending


def sync(run: RunDirectory) -> None:
    """Bring the store, if there is one, and MLflow level with a run; whichever is away keeps nothing from the other.

    What another machine has sent of it since comes here before.

    Raises:
        CodecmillError: one of them is away, or both.
        BusyError: somebody works on the run, here or on another machine.
    """
    name = run.path.name
    entry = attendance.Entry(id=f"sync-{name}-{os.getpid()}", process=os.getpid(), run=name)
    away: list[CodecmillError] = []
    with run.locked(), attendance.present(run.root, entry), shown_progress():
        if url := store_url():
            with _noting(StoreError, away):
                with leased(run):
                    catch_up(run)  # first: another machine may have gone on with it, whose choices stand
                    Sending(run, open_store(url)).send()
                print(f"{url} has all of '{name}'")
        with _noting(tracking.TrackingUnavailable, away):
            tracking.bring_level(run, is_at_rest=not away)
            print(f"MLflow has all of '{name}', at {tracking.without_password(tracking.tracking_uri(run.root))}")
    if away:
        raise CodecmillError("\n".join(map(str, away)))


@contextmanager
def _noting(kind: type[CodecmillError], failed: list[CodecmillError]) -> Iterator[None]:
    """Go on after a failure of a kind, which is told in the end."""
    try:
        yield
    except kind as error:
        failed.append(error)
