"""Which images are new, to the champion and to what went on from it and did not beat it; who is at work already, and
which training of an earlier look was cut off."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines import checkpoints
from pipelines.checkpoint_format import Manifest, read_manifest
from pipelines.config import RunConfig
from pipelines.data.shard_set import ShardSet
from pipelines.errors import CodecmillError
from pipelines.locks import owner
from pipelines.run_directory import Root, RunDirectory
from pipelines.runs import merge
from pipelines.storage import open_store, store_url
from pipelines.storage.bringing import make_set_known
from pipelines.tracking import Version

Warn = Callable[[str], None]


def new_images(shard_set: ShardSet, root: Root, champion: Version | None, warn: Warn) -> int:
    """How many images of a shard set neither the champion nor a registered run that went on from it was trained on.

    A training that went on from the champion and did not beat it would end with the same bits if it were made again:
    what it has seen is no reason for another one. Before there is a champion, the same holds for what began with none.

    Args:
        warn: told what cannot be read, so that its images count as new.

    Raises:
        CodecmillError: something cannot be read at this moment (`may_pass`).
    """
    known: set[str] = set()
    for fingerprint in _trained_on(root, champion, warn):
        try:
            known |= _images(_shard_set(root.shards / fingerprint[:16]))
        except CodecmillError as error:
            if error.may_pass:
                raise  # to take all of it for new, because a store does not answer now, would begin a training
            warn(f"What was learnt from a shard set counts as new, for it is not there. {error}")
    return len(_images(shard_set) - known)


def runs_at_work(root: Root) -> tuple[str, ...]:
    """The names of the runs that somebody holds at this moment."""
    return tuple(run.path.name for run in root.all_runs() if owner(run.lock_file))


def cut_off(config: RunConfig, root: Root, champion: Version | None) -> RunConfig | None:
    """The config to go on with of a training that a look like this began from the same champion, and that was ended
    before it was done, as by the end of its machine: with the farthest, if there are several.

    One that has saved nothing is not looked for: it would begin anew.

    Args:
        config: of the look, as it stands in the schedule: what its name leaves open may be anything.
    """
    parent = champion and champion.checkpoint_sha256
    is_ours = re.compile(re.sub(r"\\\{[a-z]+\\}", ".+", re.escape(config.name))).fullmatch
    found: list[tuple[int, RunConfig]] = []
    for run in root.all_runs():
        steps = checkpoints.steps_on_disk(run)
        if steps and is_ours(run.path.name) and not run.promotion_file.is_file():
            try:
                if read_manifest(checkpoints.folder_of(run, steps[-1])).parent == parent:
                    found.append((steps[-1], _going_on(run, config)))
            except CodecmillError:
                continue  # damaged, or with other settings than the schedule has by now: nothing to go on with
    return max(found, key=lambda each: each[0])[1] if found else None


def _going_on(run: RunDirectory, config: RunConfig) -> RunConfig:
    begun = run.read_config()
    training = config.training.model_copy(update={"start_from": begun.training.start_from})
    return merge(begun, config.model_copy(update={"name": run.path.name, "root": run.root.path, "training": training}))


def _trained_on(root: Root, champion: Version | None, warn: Warn) -> set[str]:
    """Fingerprints of shard sets."""
    parent = champion and champion.checkpoint_sha256
    children = {made.shard_set for made in _registered(root, warn) if made.parent == parent}
    return children | ({champion.fingerprint} if champion else set())


def _registered(root: Root, warn: Warn) -> Iterator[Manifest]:
    """What the newest checkpoint of each registered run says of itself."""
    for run in root.all_runs():
        steps = checkpoints.steps_on_disk(run)
        if run.promotion_file.is_file() and steps:
            try:
                yield read_manifest(checkpoints.folder_of(run, steps[-1]))
            except CodecmillError as error:
                warn(f"What run '{run.path.name}' was trained on counts as new. {error}")


def _shard_set(folder: Path) -> ShardSet:
    if url := store_url():
        make_set_known(folder, open_store(url))  # the training may have been another machine's
    return ShardSet.open(folder)


def _images(shard_set: ShardSet) -> set[str]:
    return {row.sha256 for split in shard_set.manifest.sources for row in shard_set.sources(split)}
