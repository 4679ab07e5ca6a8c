"""Bring MLflow level with a run directory: whatever it has not got yet, in the order in which it was made."""

import logging
from pathlib import Path

from pipelines import checkpoints
from pipelines.errors import CodecmillError
from pipelines.run_directory import RunDirectory, read_json
from pipelines.tracking.artifacts import log_checkpoint, log_pictures
from pipelines.tracking.runs import log_shard_set, open_run, ship_journal

log = logging.getLogger("codecmill.tracking")


def begin(run: RunDirectory) -> None:
    """Make the run known to MLflow, as running, with its config and its shard set.

    Raises:
        TrackingUnavailable: MLflow cannot be reached.
    """
    from pipelines.data.shard_set import ShardSet

    open_run(run, run.read_config())
    shard_set = ShardSet.open(Path(read_json(run.shard_set_file)["path"]))
    profile = {"samples": {split: sum(shard_set.counts(split)) for split in ("train", "validation", "test")}}
    log_shard_set(run, shard_set.fingerprint, shard_set.path, profile | shard_set.measured.as_json())


def sync(run: RunDirectory) -> None:
    """Send the journal's new steps, new pictures, and every checkpoint that is on disk and sound.

    Raises:
        TrackingUnavailable: MLflow cannot be reached; what was sent is marked, the rest comes next time.
    """
    ship_journal(run)
    log_pictures(run)
    for step in checkpoints.steps_on_disk(run):
        _send_checkpoint(run, checkpoints.folder_of(run, step))


def _send_checkpoint(run: RunDirectory, folder: Path) -> None:
    try:
        if (folder / checkpoints.MANIFEST).is_file():
            log_checkpoint(run, folder)
    except CodecmillError:
        if folder.exists():
            raise
        log.debug("%s was deleted, as one too many, while it was being sent.", folder)
