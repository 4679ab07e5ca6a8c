"""The proof, from what is on disk, that every committed step of a run consumed the samples that it should have."""

from collections.abc import Iterator

import numpy as np

from pipelines import checkpoints
from pipelines.config import Section
from pipelines.data import consumed, remote_sets
from pipelines.data.order import SampleOrder
from pipelines.data.shard_set import ShardSet
from pipelines.data.shard_verification import verify_shard
from pipelines.errors import CodecmillError
from pipelines.progress import Progress, report
from pipelines.run_directory import RunDirectory
from pipelines.training import journal

CHUNK = 1000
"""Steps that are located at a time."""


class Audit(Section):
    """What an audit found.

    Attributes:
        steps: committed, that is up to the newest sound checkpoint.
        samples: that one epoch has.
        epochs: complete ones.
        rest: samples of the epoch after them.
        attempts: how often the ranks were started.
        faults: a sentence each; empty when all is as it should be.
    """

    run: str
    steps: int
    samples: int
    epochs: int
    rest: int
    attempts: int
    faults: tuple[str, ...]


def audit(run: RunDirectory) -> Audit:
    """Read every sample's key from the tars, and compare what each step says that it read with the global order.

    Raises:
        CodecmillError: the run has no checkpoint or shard set that could be looked at.
    """
    config = run.read_config()
    newest = checkpoints.latest(run)
    if newest is None or not run.shard_set_file.is_file():
        raise CodecmillError(f"Run '{run.path.name}' has no checkpoint yet: there is nothing to audit.")
    shard_set = ShardSet.open(run.shard_set())
    order = SampleOrder(shard_set.counts("train"), config.seed, config.data.shuffle_window)
    size = config.training.batch_size
    faults = list(_altered_shards(shard_set))
    if not faults:
        faults += _wrong_steps(run, size, newest.step, order, _keys(shard_set))
        faults += _uneven_epochs(newest.step * size, order, shard_set.counts("train"))
    epochs, rest = divmod(newest.step * size, order.total)
    return Audit(
        run=run.path.name,
        steps=newest.step,
        samples=order.total,
        epochs=epochs,
        rest=rest,
        attempts=sum(1 for _ in run.logs.glob("attempt_*")),
        faults=tuple(faults),
    )


def _altered_shards(shard_set: ShardSet) -> Iterator[str]:
    """Of those that are here: each sample of the others is fetched, and compared with its checksum, for its key."""
    rows = remote_sets.rows_here(shard_set.path, shard_set.rows("train"))
    for done, row in enumerate(rows):
        report(Progress("audit", done, len(rows), "shards", row.tar))
        yield from (f"{file} {how}." for file, how in verify_shard(shard_set.path, row))
    report(Progress("audit", len(rows), len(rows), "shards"))


def _keys(shard_set: ShardSet) -> list[list[str]]:
    """Every training sample's key, as its tar member says it."""
    counts = shard_set.counts("train")
    return [[shard_set.read("train", shard, i).key for i in range(count)] for shard, count in enumerate(counts)]


def _wrong_steps(run: RunDirectory, size: int, last: int, order: SampleOrder, keys: list[list[str]]) -> Iterator[str]:
    """Steps that are missing, twice in the journal, or say that they read other samples than they should have."""
    said: dict[int, object] = {}
    for line in journal.read(run.journal):
        if line["step"] in said:
            yield f"{run.journal} has step {line['step']} twice."
        said[line["step"]] = line.get("samples")
    for first in range(0, last, CHUNK):
        report(Progress("audit", first, last, "steps"))
        positions = np.arange(first * size, min(first + CHUNK, last) * size)
        _, shards, indices = order.locate_many(positions)
        places = zip(positions.tolist(), shards.tolist(), indices.tolist(), strict=True)
        numbers = [consumed.key_number(position, keys[shard][index]) for position, shard, index in places]
        for step in range(first + 1, min(first + CHUNK, last) + 1):
            start = (step - 1 - first) * size
            if step not in said:
                yield f"{run.journal} has no step {step}."
            elif said[step] != consumed.digest(numbers[start : start + size]):
                yield f"Step {step} did not read the samples that it should have, says {run.journal}."
    report(Progress("audit", last, last, "steps"))


def _uneven_epochs(end: int, order: SampleOrder, counts: list[int]) -> Iterator[str]:
    """Epochs up to a position in which the order has a sample twice; the last one may be incomplete."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    for epoch, first in enumerate(range(0, end, order.total)):
        _, shards, indices = order.locate_many(np.arange(first, min(first + order.total, end)))
        samples = starts[shards] + indices
        if len(np.unique(samples)) != len(samples):
            yield f"Epoch {epoch} has a sample twice."
