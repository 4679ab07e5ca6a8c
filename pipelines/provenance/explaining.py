"""What made a checkpoint, as its manifest and the files beside it say: read in an instant, and not verified."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from pipelines import checkpoint_format
from pipelines.config import Section
from pipelines.data import remote_sets, shard_format
from pipelines.data.shard_format import SPLITS, ShardRow, Split, is_whole, read_sources
from pipelines.errors import CodecmillError
from pipelines.file_digests import file_sha256
from pipelines.provenance.chain import Chain, chain_of
from pipelines.provenance.locating import Found, with_weights


class Samples(Section):
    """The training samples that were consumed: positions `first` to `last` of the endless order; -1 for none.

    Attributes:
        epochs, of_next: so many whole epochs and so many samples of the next; None where the shard set is not there.
    """

    count: int
    first: int
    last: int
    epochs: int | None
    of_next: int | None
    samples_per_epoch: int | None


class Parent(Section):
    """The weights that the run started from.

    Attributes:
        named: what `training.start_from` says.
        kept: the run's own copy.
        checkpoint: a checkpoint under the root that has them.
    """

    sha256: str
    named: str | None
    kept: Path | None
    checkpoint: Path | None


class SourceLine(Section):
    """A source image that gave samples, with its mask if it has one."""

    path: str
    sha256: str
    split: Split
    samples: int
    shard: str
    mask: str | None
    mask_sha256: str | None


class ShardSetLines(Section):
    """The shard set; what its own manifest would say is empty where that cannot be read, and `problem` says why."""

    fingerprint: str
    manifest_sha256: str | None
    path: Path | None
    shards: tuple[ShardRow, ...] = ()
    source_counts: dict[Split, int] = Field(default_factory=dict)
    sample_counts: dict[Split, int] = Field(default_factory=dict)
    sources: tuple[SourceLine, ...] = ()
    problem: str | None = None


class Explanation(Section):
    """All that made a checkpoint.

    Attributes:
        manifest_sha256: of the checkpoint's `checkpoint.json`, from which the digests of all else follow.
        how: how an address was understood; empty for a folder or a run.
        is_sealed: whether the checkpoint's own manifest says all this; one of an older codecmill does not say
            config, commit and digest of the shard set's manifest.
    """

    checkpoint: Path
    manifest_sha256: str
    how: str
    is_sealed: bool
    run: str
    run_directory: Path | None
    step: int
    files: dict[str, checkpoint_format.FileRecord]
    samples: Samples
    config_file: Path | None
    config: dict[str, Any] | None
    git_commit: str | None
    versions: dict[str, str]
    legs: tuple[checkpoint_format.Leg, ...]
    parent: Parent | None
    shard_set: ShardSetLines


def explain(found: Found, most_sources: int | None = None) -> Explanation:
    """What made the (first) checkpoint that was found.

    Args:
        most_sources: how many source images are listed; None lists all.

    Raises:
        CodecmillError: the checkpoint's manifest is missing, damaged or altered.
    """
    chain = chain_of(found.folders[0], found.run, found.root)
    manifest, config = chain.manifest, chain.config()
    shard_set = _shard_set(chain, most_sources)
    return Explanation(
        checkpoint=chain.folder,
        manifest_sha256=file_sha256(chain.folder / checkpoint_format.MANIFEST),
        how=found.how,
        is_sealed=manifest.config is not None,
        run=manifest.run,
        run_directory=chain.run.path if chain.run else None,
        step=manifest.step,
        files=manifest.files,
        samples=_samples(manifest.position, shard_set.sample_counts.get("train")),
        config_file=chain.run.config_file if chain.run and chain.run.config_file.is_file() else None,
        config=config,
        git_commit=manifest.git_commit,
        versions=manifest.versions,
        legs=manifest.legs,
        parent=_parent(chain, config, found),
        shard_set=shard_set,
    )


def _samples(position: int, per_epoch: int | None) -> Samples:
    epochs, of_next = divmod(position, per_epoch) if per_epoch else (None, None)
    return Samples(
        count=position,
        first=0 if position else -1,
        last=position - 1,
        epochs=epochs,
        of_next=of_next,
        samples_per_epoch=per_epoch,
    )


def _parent(chain: Chain, config: dict[str, Any] | None, found: Found) -> Parent | None:
    sha256, kept = chain.manifest.parent, chain.kept_parent
    if sha256 is None:
        return None
    training = (config or {}).get("training")
    named = training.get("start_from") if isinstance(training, dict) else None
    return Parent(
        sha256=sha256,
        named=str(named) if named else None,
        kept=kept if kept and kept.is_file() else None,
        checkpoint=with_weights(sha256, found.root),
    )


def _shard_set(chain: Chain, most_sources: int | None) -> ShardSetLines:
    fingerprint, recorded, folder = chain.manifest.shard_set, chain.manifest.shard_manifest_sha256, chain.shard_folder
    missing = ShardSetLines(fingerprint=fingerprint, manifest_sha256=recorded, path=folder)
    try:
        manifest = chain.shard_manifest()
    except CodecmillError as error:
        return missing.model_copy(update={"problem": str(error)})
    if manifest is None or folder is None:
        return missing.model_copy(update={"problem": "It is not on this machine, or not under this root (--root)."})
    try:
        sources, problem = tuple(islice(_sources(folder, manifest), most_sources)), None
    except CodecmillError as error:
        sources, problem = (), str(error)
    return ShardSetLines(
        fingerprint=fingerprint,
        manifest_sha256=recorded,
        path=folder,
        shards=tuple(manifest.shards),
        source_counts=manifest.sources,
        sample_counts=manifest.samples,
        sources=sources,
        problem=problem,
    )


def _sources(folder: Path, manifest: shard_format.Manifest) -> Iterator[SourceLine]:
    for split in SPLITS:
        for shard in (row for row in manifest.shards if row.split == split):
            if not is_whole(folder / shard.sources, shard.sources_bytes):
                url = remote_sets.origin(folder)
                how = f"lies in {url} only" if url else "is missing or cut"
                raise CodecmillError(f"{folder / shard.sources} {how}.")
            for source in read_sources(folder / shard.sources):
                yield SourceLine(
                    path=source.path,
                    sha256=source.image_sha256,
                    split=split,
                    samples=source.samples,
                    shard=shard.tar,
                    mask=source.mask,
                    mask_sha256=source.mask_sha256,
                )
