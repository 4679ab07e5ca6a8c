"""The links of a chain that lie in the data: the shard set's manifest, every shard and sample, every source image."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.data import other_manifests, remote_sets, shard_format
from pipelines.data.shard_format import read_sources
from pipelines.data.shard_verification import fingerprint_difference, settings_difference, verify_shard
from pipelines.errors import CodecmillError
from pipelines.file_digests import file_sha256
from pipelines.provenance import remedies
from pipelines.provenance.chain import Chain
from pipelines.provenance.ledger import Ledger


def verify_shard_set(chains: Sequence[Chain], with_sources: bool, ledger: Ledger) -> int:
    """Verify the one shard set that some checkpoints were trained on; returns how many source images were read."""
    newest = chains[-1]
    folder, way_out = newest.shard_folder, remedies.of_shards(newest)
    if folder is None:
        how = f"names shard set {newest.manifest.shard_set[:16]}, which was not found"
        ledger.wrong(newest.folder / "checkpoint.json", how, remedies.of_missing_set(newest))
        return 0
    manifest = _manifest(folder, chains, way_out, ledger)
    if manifest is None:
        return 0
    ledger.expected += 3 * len(manifest.shards) + (sum(manifest.sources.values()) if with_sources else 0)
    lists = _verify_shards(folder, _here(folder, manifest, ledger), way_out, ledger)
    if len(lists) == len(manifest.shards):
        _verify_name(folder, manifest, lists, way_out, ledger)
    return _verify_sources(lists, ledger) if with_sources else 0


def verify_shard_manifest(chains: Sequence[Chain], ledger: Ledger) -> None:
    """Of the one shard set that some checkpoints were trained on, only that its manifest is the one that they name."""
    if (folder := chains[-1].shard_folder) is not None:
        _manifest(folder, chains, remedies.of_shards(chains[-1]), ledger)


def _manifest(folder: Path, chains: Sequence[Chain], way_out: str, ledger: Ledger) -> shard_format.Manifest | None:
    """The set's manifest, if it can be read; where it is not the one that was trained on, all else is checked by it."""
    file = folder / shard_format.MANIFEST
    ledger.begin(file)
    try:
        manifest = chains[-1].shard_manifest()
        found = file_sha256(file, ledger.heard)
    except (CodecmillError, OSError) as error:
        ledger.wrong(file, str(error).removeprefix(f"{file} ").partition(". ")[0].rstrip("."), way_out)
        return None
    of_others: dict[str, list[str]] = {}
    for chain in chains:
        recorded = chain.manifest.shard_manifest_sha256
        if recorded not in (None, found):
            of_others.setdefault(recorded, []).append(chain.folder.name)
    for recorded, names in of_others.items():
        if other_manifests.is_known_as(folder, recorded):
            continue
        how = f"was changed since {', '.join(names)}: its sha256 is {found[:16]}... instead of {recorded[:16]}..."
        ledger.wrong(file, how, way_out)
    return manifest


def _here(folder: Path, manifest: shard_format.Manifest, ledger: Ledger) -> list[shard_format.ShardRow]:
    """The shards that should be here; of the others it is told that they were not read."""
    here = remote_sets.rows_here(folder, manifest.shards)
    if left := len(manifest.shards) - len(here):
        where = remote_sets.origin(folder)
        ledger.note(f"{left} of {len(manifest.shards)} shards of {folder} lie in {where} only, and were not read.")
    return here


def _verify_shards(folder: Path, rows: Sequence[shard_format.ShardRow], way_out: str, ledger: Ledger) -> list[Path]:
    """Verify all files of some shards; returns those lists of sources that are as they were."""
    lists = []
    for row in rows:
        for name, _, _ in row.files():
            ledger.begin(folder / name)
        damaged = set()
        for file, how in verify_shard(folder, row, ledger.heard):
            ledger.wrong(file, how, way_out)
            damaged.add(file.name)
        if row.sources not in damaged:
            lists.append(folder / row.sources)
    return lists


def _verify_name(
    folder: Path, manifest: shard_format.Manifest, lists: list[Path], way_out: str, ledger: Ledger
) -> None:
    """The set's own name is a hash of its settings and sources."""
    try:
        used = (row.sha256 for file in lists for row in read_sources(file))
        how = settings_difference(manifest) or fingerprint_difference(manifest, used)
    except CodecmillError as error:
        how = f"names lists of sources that cannot be read: {error}"
    if how:
        ledger.wrong(folder / shard_format.MANIFEST, how, way_out)


def _verify_sources(lists: list[Path], ledger: Ledger) -> int:
    """Read every source image and mask; returns how many images."""
    count = 0
    for file in lists:
        try:
            for row in read_sources(file):
                count += 1
                ledger.check(Path(row.path), row.bytes, row.image_sha256, remedies.of_source())
                if row.mask is not None and row.mask_sha256 is not None:
                    ledger.check(Path(row.mask), None, row.mask_sha256, remedies.of_source())
        except (
            CodecmillError,
            ValueError,
        ) as error:  # a path that none can be; somebody else's list, which is what its manifest says
            ledger.wrong(file, f"is no list of sources: {error}", "Do not use this set.")
    return count
