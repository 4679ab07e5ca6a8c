"""Every byte that a checkpoint comes from, read and compared with what was recorded of it, link by link."""

import time
from collections.abc import Collection
from pathlib import Path

from pipelines import checkpoint_format
from pipelines.checkpoints import Checkpoint
from pipelines.config import Section
from pipelines.errors import CodecmillError
from pipelines.provenance import remedies
from pipelines.provenance.chain import Chain, chain_of
from pipelines.provenance.data_links import verify_shard_manifest, verify_shard_set
from pipelines.provenance.ledger import Ledger, Problem
from pipelines.provenance.locating import Found
from pipelines.provenance.run_links import verify_choices, verify_parent, verify_pointer
from pipelines.run_directory import step_name


class Verification(Section):
    """What was verified, and what is wrong.

    Attributes:
        files, bytes: that were read.
        sources: how many source images were read; None where they were not to be.
        notes: what is worth knowing and not wrong.
    """

    checkpoints: tuple[Path, ...]
    shard_sets: tuple[Path, ...]
    files: int
    bytes: int
    sources: int | None
    seconds: float
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def verify(found: Found, with_sources: bool = False, but: Collection[Path] = ()) -> Verification:
    """Verify checkpoints and all that they come from: their run's files, every shard, and every sample in it.

    Args:
        with_sources: read every source image and mask as well.
        but: shard sets of which shards and sources were verified already.
    """
    started, ledger = time.monotonic(), Ledger(expected=4 * len(found.folders))
    chains = [chain for folder in found.folders if (chain := _opened(folder, found, ledger))]
    for chain in chains:
        _verify_files(chain, ledger)
    for chain in {chain.manifest.parent: chain for chain in chains}.values():
        verify_parent(chain, found.root, ledger)
    if found.run is not None and chains:
        verify_choices(found.run, chains, ledger)
        verify_pointer(found.run, chains, ledger)
    sources = 0
    by_set = {chain.manifest.shard_set: chain for chain in chains}
    for fingerprint, newest in by_set.items():
        its = [chain for chain in chains if chain.manifest.shard_set == fingerprint]
        if newest.shard_folder in but:
            verify_shard_manifest(its, ledger)
        else:
            sources += verify_shard_set(its, with_sources, ledger)
    ledger.end()
    return Verification(
        checkpoints=found.folders,
        shard_sets=tuple(chain.shard_folder for chain in by_set.values() if chain.shard_folder),
        files=ledger.files,
        bytes=ledger.bytes,
        sources=sources if with_sources else None,
        seconds=time.monotonic() - started,
        problems=tuple(ledger.problems),
        notes=tuple(ledger.notes),
    )


def _opened(folder: Path, found: Found, ledger: Ledger) -> Chain | None:
    """A checkpoint by its manifest, whose seal says whether any byte of it has changed."""
    file = folder / checkpoint_format.MANIFEST
    ledger.begin(file)
    try:
        chain = chain_of(folder, found.run, found.root)
        ledger.heard(file.stat().st_size)
    except (CodecmillError, OSError) as error:
        if folder.exists() or len(found.folders) == 1:
            ledger.wrong(
                file, str(error).removeprefix(f"{file} ").rstrip("."), remedies.of_checkpoint(folder, found.run)
            )
        else:
            ledger.note(f"{folder} was deleted meanwhile, as one too many.")
        return None
    if chain.manifest.config is None:
        ledger.note(f"{file} is of an older codecmill: it has no seal, no config, and no digest of its shard manifest.")
    # Out of MLflow, what was trained again has a name like step_00000200.0a1b2c3d.
    if folder.name.startswith("step_") and folder.name.partition(".")[0] != step_name(chain.manifest.step):
        how = f"is that of step {chain.manifest.step}, in a folder of another name"
        ledger.wrong(file, how, f"Rename the folder to {step_name(chain.manifest.step)}.")
    return chain


def _verify_files(chain: Chain, ledger: Ledger) -> None:
    way_out = remedies.of_checkpoint(chain.folder, chain.run)
    before = len(ledger.problems)
    for name in checkpoint_format.file_names(chain.manifest):
        record, known = chain.manifest.files.get(name), len(ledger.problems)
        if record is None:
            ledger.wrong(chain.folder / checkpoint_format.MANIFEST, f"does not name {name}", way_out)
        else:
            ledger.check(chain.folder / name, record.bytes, record.sha256, way_out)
        if not chain.folder.exists():  # a training that goes on has deleted it
            del ledger.problems[known:]
            ledger.note(f"{chain.folder} was deleted meanwhile, as one too many.")
            return
    if chain.manifest.is_sharded and len(ledger.problems) == before:
        _verify_weights(chain, ledger, way_out)


def _verify_weights(chain: Chain, ledger: Ledger, way_out: str) -> None:
    """Whether sound shards make the weights that their checkpoint is known by."""
    from pipelines.checkpoint_tensors import stored_weights
    from pipelines.stored_tensors import sha256_as_one_file

    file = chain.folder / checkpoint_format.SHARDING
    try:
        found = sha256_as_one_file(stored_weights(Checkpoint(chain.folder, chain.manifest)))
    except CodecmillError as error:
        ledger.wrong(file, f"does not fit its shards: {error}".rstrip("."), way_out)
        return
    if found != chain.manifest.weights_sha256:
        ledger.wrong(file, f"makes weights with another sha256 than its checkpoint's, {found[:16]}...", way_out)
