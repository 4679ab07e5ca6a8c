"""A checkpoint trained once more from what it says that it was made of, and its bytes compared."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines import checkpoint_format, checkpoints, versions
from pipelines.config import RunConfig, Section
from pipelines.data import other_manifests
from pipelines.data.shard_format import MANIFEST
from pipelines.durable_files import built_folder, sync_file, write_json
from pipelines.errors import CodecmillError, InputError, first_fault
from pipelines.file_digests import difference
from pipelines.provenance import remedies
from pipelines.provenance.chain import Chain, chain_of
from pipelines.provenance.locating import Found, readable
from pipelines.run_directory import Root, RunDirectory
from pipelines.training import launch, machine
from pipelines.training.following import Listen

EARLIER: dict[str, bool | int | str] = {"parallel": "ddp"}
"""What legs do not say that were trained before there was a choice.

Else what a leg does not say is as the checkpoint's config has it.
"""


class Reproduction(Section):
    """What came of training a checkpoint again.

    Attributes:
        differing: files of the checkpoint whose bytes did not come out again; empty where all did.
        other_versions: what runs here is not what trained the checkpoint: `package recorded -> here`.
        again: the folder of the checkpoint that was trained now; None where it was identical, and is deleted.
    """

    checkpoint: Path
    step: int
    sha256: str
    sha256_again: str
    differing: tuple[str, ...]
    other_versions: tuple[str, ...]
    again: Path | None


def reproduce(found: Found, on_line: Listen) -> Reproduction:
    """Train a checkpoint again beside the run, leg by leg, and compare; interrupted, the next call goes on.

    Raises:
        InputError: this machine has not what it was trained on.
        CodecmillError: what it was made of is not recorded, or not there any more.
        Interrupted: the training was asked to stop.
    """
    chain = chain_of(found.folders[0], found.run, found.root)
    recorded = _recorded(chain)
    legs, device = _legs(chain, recorded), str(recorded.training.device)
    _check_machine(chain, legs)
    run = _scratch_run(chain, found.root)
    with run.locked() as lock:
        if _is_of_another_call(run, chain.manifest.step, device):
            _clear(run)
        _lay_out(run, chain)
        again = [_train(run, lock, config, until, on_line) for until, config in legs][-1]
        was, now = chain.manifest.files, again.manifest.files
        differing = tuple(name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name))
    if not differing:
        shutil.rmtree(run.path)
    return Reproduction(
        checkpoint=chain.folder,
        step=chain.manifest.step,
        sha256=str(checkpoint_format.weights_sha256(chain.manifest)),
        sha256_again=again.sha256,
        differing=differing,
        other_versions=tuple(_other_versions(chain.manifest, device)),
        again=again.path if differing else None,
    )


def _recorded(chain: Chain) -> RunConfig:
    """The config that the checkpoint names, all of whose inputs are here and are what they were.

    Raises:
        CodecmillError: they are not.
    """
    manifest, config = chain.manifest, chain.manifest.run_config()
    if config is None:
        raise CodecmillError(f"{chain.folder} is of an older codecmill and does not say what it was trained with.")
    if not manifest.step:
        raise CodecmillError(f"{chain.folder} is of step 0: there is nothing to train again.")
    if chain.shard_folder is None:
        raise CodecmillError(
            f"Shard set {manifest.shard_set[:16]} of {chain.folder} was not found. {remedies.of_missing_set(chain)}"
        )
    chain.shard_manifest()
    recorded, file = str(manifest.shard_manifest_sha256), chain.shard_folder / MANIFEST
    if not other_manifests.is_known_as(chain.shard_folder, recorded):
        raise CodecmillError(f"{file} {difference(file, None, recorded)}. {remedies.of_shards(chain)}")
    if manifest.parent is not None:
        _check_parent(chain, manifest.parent)
    return config


def _check_parent(chain: Chain, sha256: str) -> None:
    kept = chain.kept_parent
    how = difference(kept, None, sha256) if kept else "is not known: the checkpoint lies outside its run"
    if how:
        raise CodecmillError(f"{kept or 'The file of the first weights'} {how}. Restore it from a copy of the parent.")


def _legs(chain: Chain, recorded: RunConfig) -> list[tuple[int, RunConfig]]:
    """The last step of each leg, and the config that it is trained with: the recorded one, with its own choices.

    Raises:
        CodecmillError: such choices are none of this version.
    """
    own = [(leg.until, EARLIER | leg.training) for leg in chain.manifest.legs]
    try:
        return [(until, _with(recorded, choices)) for until, choices in [*own, (chain.manifest.step, {})]]
    except ValidationError as error:
        raise CodecmillError(
            f"{chain.folder} cannot be trained again here: a leg of it names no config of this version: "
            f"{first_fault(error)}."
        ) from error


def _with(recorded: RunConfig, choices: dict[str, Any]) -> RunConfig:
    values = recorded.model_dump(mode="json")
    return RunConfig.model_validate(values | {"training": values["training"] | choices})


def _check_machine(chain: Chain, legs: list[tuple[int, RunConfig]]) -> None:
    """Refuse what cannot be trained to its end before anything is trained.

    Raises:
        InputError: this machine has not what a leg was trained on.
    """
    for until, config in legs:
        lack = machine.lack(config.training)
        if lack:
            raise InputError(
                f"{chain.folder} cannot be trained again here, up to step {until}: {lack[0]} Reproduce it on a "
                "machine like that which trained it."
            )


def _is_of_another_call(run: RunDirectory, last: int, device: str) -> bool:
    """Whether what lies in a scratch run is no beginning of this reproduction.

    One that was trained to its end would be told again instead of tried again, and other code or packages than those
    that are here may be what made it differ.
    """
    steps = checkpoints.steps_on_disk(run)
    manifests = [readable(checkpoints.folder_of(run, step)) for step in steps]
    here = versions.git_commit(), versions.package_versions(device)
    return last in steps or any(found is None or (found.git_commit, found.versions) != here for found in manifests)


def _clear(run: RunDirectory) -> None:
    """Delete all that lies in a run but for its lock, which is held."""
    for each in run.path.iterdir():
        if each.is_dir():
            shutil.rmtree(each)
        elif each != run.lock_file:
            each.unlink()


def _scratch_run(chain: Chain, root: Root) -> RunDirectory:
    """Where the checkpoint is trained again: named by what it is, so that the next call finds what this one has."""
    name = hashlib.sha256((chain.folder / checkpoint_format.MANIFEST).read_bytes()).hexdigest()[:16]
    return RunDirectory(root.runs / f".tmp-reproduced-{name}")


def _lay_out(run: RunDirectory, chain: Chain) -> None:
    """Give a run what it trains on and starts from, whole, for the next call believes what is there."""
    write_json(run.shard_set_file, {"fingerprint": chain.manifest.shard_set, "path": str(chain.shard_folder)})
    if chain.kept_parent and not run.start_weights.is_dir():
        with built_folder(run.start_weights) as building:
            shutil.copytree(chain.kept_parent.parent, building, dirs_exist_ok=True)
            for file in building.iterdir():
                sync_file(file)


def _train(run: RunDirectory, lock: int, config: RunConfig, until: int, on_line: Listen) -> checkpoints.Checkpoint:
    run.write_config(config)
    return launch.train(run, lock, on_line, until)


def _other_versions(manifest: checkpoint_format.Manifest, device: str) -> Iterator[str]:
    here = versions.package_versions(device) | {"codecmill's commit": versions.git_commit() or "unknown"}
    recorded = manifest.versions | {"codecmill's commit": manifest.git_commit or "unknown"}
    for name, version in recorded.items():
        now = here.get(name) or versions.installed(name)
        if now != version:
            yield f"{name} {version} -> {now or 'not installed'}"
