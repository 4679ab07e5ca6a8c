"""What a run has on disk already, as values for the tasks that follow."""

from pathlib import Path

from pipelines import checkpoints
from pipelines.errors import InputError
from pipelines.run_directory import read_json
from tasks.values import CheckpointReference, HeldRun, ShardSetReference


def trained(run: HeldRun) -> tuple[ShardSetReference, CheckpointReference]:
    """The shard set and the checkpoint that a run is evaluated by: the best validated one, else the newest.

    Raises:
        InputError: the run has no checkpoint yet.
    """
    checkpoint = checkpoints.best(run.directory)
    if checkpoint is None:
        raise InputError(f"Run '{run.name}' has no checkpoint yet. Train it first: codecmill resume {run.name}")
    return shard_set_at(Path(read_json(run.directory.shard_set_file)["path"])), reference(checkpoint)


def shard_set_at(path: Path) -> ShardSetReference:
    from pipelines.data.shard_set import ShardSet

    shard_set = ShardSet.open(path)
    samples = {split: sum(shard_set.counts(split)) for split in ("train", "validation", "test")}
    return ShardSetReference(fingerprint=shard_set.fingerprint, path=path, samples=samples)


def reference(checkpoint: checkpoints.Checkpoint) -> CheckpointReference:
    return CheckpointReference(path=checkpoint.path, step=checkpoint.step, sha256=checkpoint.sha256)
