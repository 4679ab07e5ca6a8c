"""What a run has on disk already, as values for the tasks that follow."""

import logging
from pathlib import Path

from pipelines import checkpoints
from pipelines.durable_files import write_json
from pipelines.errors import CodecmillError, InputError
from pipelines.tolerant_reading import json_object, text
from tasks.values import CheckpointReference, HeldRun, ShardSetReference

log = logging.getLogger("codecmill.runs")


def recorded_shard_set(run: HeldRun) -> ShardSetReference | None:
    """The shard set that a run began with, if it is there and whole.

    Raises:
        InputError: a setting does not let it be opened.
    """
    if not run.directory.shard_set_file.is_file():
        return None
    try:
        return shard_set_at(run.directory.shard_set())
    except InputError:
        raise
    except CodecmillError as error:
        log.warning("The run's shard set is made again: %s", error)
        return None


def record_shard_set(run: HeldRun, made: ShardSetReference) -> None:
    """Write down the shard set that a run trains on, for all of its life.

    Raises:
        CodecmillError: it began with another one.
    """
    file = run.directory.shard_set_file
    former = text(json_object(file.read_bytes()), "fingerprint") if file.is_file() else None
    if former is None and (newest := next(checkpoints.readable_manifests(run.directory), None)):
        former = newest.shard_set
    if former is not None and former != made.fingerprint:
        raise CodecmillError(
            f"Run '{run.name}' began with shard set {former[:16]}, which is not whole any more, and the "
            f"images now make {made.fingerprint[:16]}. Restore the set or the images as they were, "
            "or start a new run with --name."
        )
    write_json(file, {"fingerprint": made.fingerprint, "path": str(made.path)})


def trained(run: HeldRun) -> tuple[ShardSetReference, CheckpointReference]:
    """The shard set and the checkpoint that a run is evaluated by: the best validated one, else the newest.

    Raises:
        InputError: the run has no checkpoint yet.
    """
    checkpoint = checkpoints.best(run.directory)
    if checkpoint is None:
        raise InputError(f"Run '{run.name}' has no checkpoint yet. Train it first: {run.directory.command('resume')}")
    return shard_set_at(run.directory.shard_set()), reference(checkpoint)


def shard_set_at(path: Path) -> ShardSetReference:
    from pipelines.data.shard_set import ShardSet

    shard_set = ShardSet.open(path)
    samples = {split: sum(shard_set.counts(split)) for split in ("train", "validation", "test")}
    return ShardSetReference(fingerprint=shard_set.fingerprint, path=path, samples=samples)


def reference(checkpoint: checkpoints.Checkpoint) -> CheckpointReference:
    return CheckpointReference(path=checkpoint.path, step=checkpoint.step, sha256=checkpoint.sha256)
