"""Bring MLflow level with a run directory: whatever it has not got yet, in the order in which it was made."""

import logging
from pathlib import Path

from pipelines import checkpoints
from pipelines.data.shard_format import Manifest
from pipelines.errors import CodecmillError
from pipelines.progress import Progress, report
from pipelines.run_directory import RunDirectory
from pipelines.tracking.artifacts import log_checkpoint, log_evaluations, log_load_report, log_pictures
from pipelines.tracking.marks import unsent_checkpoints
from pipelines.tracking.runs import log_shard_set, open_run, set_status, ship_journal

log = logging.getLogger("codecmill.tracking")


def begin(run: RunDirectory, is_running: bool = True) -> None:
    """Make the run known to MLflow, with its config and its shard set.

    Args:
        is_running: say so; else MLflow says after it what it did.

    Raises:
        TrackingUnavailable: MLflow cannot be reached.
    """
    open_run(run, run.read_config(), is_running)
    if not run.shard_set_file.is_file():
        return
    try:
        folder = run.shard_set()
        manifest = Manifest.read(folder)  # no look at the shards, which may have been deleted for room
    except CodecmillError as error:
        log.warning("MLflow is not told which shard set '%s' has: %s", run.path.name, error)
        return
    profile = {"samples": manifest.samples, "mean": manifest.mean, "std": manifest.std}
    log_shard_set(run, manifest.fingerprint, folder, profile)


def sync(run: RunDirectory, told: bool = False) -> None:
    """Send the journal's new steps, new pictures, what weights it started from, and every checkpoint that is on disk.

    Args:
        told: report how far it is.

    Raises:
        TrackingUnavailable: MLflow cannot be reached; what was sent is marked, the rest comes next time.
    """
    ship_journal(run)
    log_pictures(run)
    log_load_report(run)
    unsent = sorted(unsent_checkpoints(run))
    for done, step in enumerate(unsent):
        folder = checkpoints.folder_of(run, step)
        if told:
            report(Progress("upload", done, len(unsent), "checkpoints", f"sending {folder.name} to MLflow"))
        _send_checkpoint(run, folder)
    if told and unsent:
        report(Progress("upload", len(unsent), len(unsent), "checkpoints"))


def bring_level(run: RunDirectory, is_at_rest: bool = True) -> None:
    """All that `begin` and `sync` send, of a run that nobody works on here, its evaluations, and how it stands.

    Args:
        is_at_rest: whether that is sure of other machines, too; else MLflow says after it what it did, or a command
            that knows more puts it right.

    Raises:
        TrackingUnavailable: MLflow cannot be reached.
    """
    begin(run, is_running=False)  # whatever ends this half-way leaves no run that is said to be running
    sync(run, told=True)
    log_evaluations(run)
    newest = checkpoints.latest(run)
    done = newest is not None and newest.step >= run.read_config().training.steps
    if done or is_at_rest:
        set_status(run, "FINISHED" if done else "KILLED")
    _release(run, newest)


def release(run: RunDirectory) -> None:
    """Delete the checkpoints that were only kept until MLflow had them."""
    _release(run, checkpoints.latest(run))


def _release(run: RunDirectory, newest: checkpoints.Checkpoint | None) -> None:
    if newest is not None:
        keep_latest = run.read_config().training.keep_latest
        checkpoints.retain(run, newest, keep_latest, spared=unsent_checkpoints(run))


def _send_checkpoint(run: RunDirectory, folder: Path) -> None:
    try:
        checkpoints.open_checkpoint(folder)
    except CodecmillError as error:
        log.warning("A damaged checkpoint is not sent to MLflow: %s", error)
    else:
        log_checkpoint(run, folder)
