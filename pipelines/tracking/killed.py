"""What MLflow says of a run whose processes were all killed, put right; a program, since MLflow takes long to import.

`python -m pipelines.tracking.killed ROOT RUN...`
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pipelines.errors import BusyError, CodecmillError
from pipelines.process_lifetime import die_with_parent
from pipelines.run_directory import Root, RunDirectory
from pipelines.status import run_status
from pipelines.storage.lease import is_at_work_elsewhere
from pipelines.tracking.connection import TrackingUnavailable, connected
from pipelines.tracking.marks import read_marks
from pipelines.tracking.runs import marked

LOCK_SECONDS = 3.0
"""How long ranks whose command was killed may hold the run: they die with it."""


def mark_killed(run: RunDirectory) -> None:
    """Set the run's status in MLflow to KILLED, or to FINISHED where all of it is done; never that of one at work here.

    Raises:
        TrackingUnavailable: MLflow cannot be reached.
    """
    marks = read_marks(run)
    if marks is None:
        return  # MLflow has not heard of it
    with connected(run.root) as client, suppress(BusyError), run.locked(LOCK_SECONDS):
        is_done = all(stage.state == "done" for stage in run_status(run).stages)
        status = "FINISHED" if is_done else "KILLED"
        known = marked(client, run, marks)
        # One that was deleted on MLflow's page takes no status; opened again it comes back, and is at work.
        if known is not None and known.info.lifecycle_stage == "active" and known.info.status != status:
            client.set_terminated(known.info.run_id, status=status)


def mark_all_killed(root: Root, names: list[str]) -> None:
    """`mark_killed` those of the runs that no other machine has taken over.

    Raises:
        TrackingUnavailable: MLflow cannot be reached. CodecmillError: one could not be marked, or the store does not
            say whether another machine has it; the others are marked all the same.
    """
    runs = [run for run in map(root.run, names) if run.config_file.is_file()]
    fault: CodecmillError | None = None
    with ThreadPoolExecutor(max(len(runs), 1)) as pool:  # all at once: each lease is looked at for seconds
        for run, looking in [(run, pool.submit(is_at_work_elsewhere, run)) for run in runs]:
            try:
                if not looking.result():
                    mark_killed(run)
            except TrackingUnavailable:
                raise
            except CodecmillError as error:
                fault = error
    if fault is not None:
        raise fault


if __name__ == "__main__":
    die_with_parent()
    mark_all_killed(Root(Path(sys.argv[1])), sys.argv[2:])
