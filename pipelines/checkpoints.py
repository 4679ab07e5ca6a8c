"""Checkpoints on disk: saved whole or not at all, found again only when every byte is as it was written."""

import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from pipelines.checkpoint_format import (
    FORMAT_VERSION,
    MANIFEST,
    STATE_SCALARS,
    STATE_TENSORS,
    WEIGHTS,
    FileRecord,
    Manifest,
    TrainingState,
    file_names,
    read_manifest,
)
from pipelines.durable_files import built_folder, read_json, write_bytes, write_json
from pipelines.errors import CodecmillError, first_fault
from pipelines.file_digests import difference, file_sha256
from pipelines.run_directory import RunDirectory, step_name
from pipelines.sealed_json import write_sealed

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("codecmill.checkpoints")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder and what its manifest says."""

    path: Path
    manifest: Manifest
    unread: frozenset[str] = frozenset()
    """Files whose bytes are verified by whoever reads them."""

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def sha256(self) -> str:
        """What a checkpoint is known by: the sha256 of its weights' file, or of what that would be."""
        return self.manifest.weights_sha256 or self.manifest.files[WEIGHTS].sha256


def folder_of(run: RunDirectory, step: int) -> Path:
    return run.checkpoints / step_name(step)


def save(
    run: RunDirectory,
    about: Mapping[str, Any],
    weights: Mapping[str, "Tensor"],
    state_tensors: Mapping[str, "Tensor"],
    state_scalars: Mapping[str, Any],
) -> Checkpoint:
    """Write a checkpoint; a crash at any moment leaves it whole or invisible.

    Args:
        about: the manifest's fields but for `format_version`, `run` and `files`.
        weights: all tensors of the model, by name.
        state_tensors: the optimiser's tensors, by name.
        state_scalars: the rest of the training's state, as JSON.
    """
    from safetensors.torch import save as to_bytes

    final = folder_of(run, about["step"])
    with built_folder(final) as building:
        write_bytes(building / WEIGHTS, to_bytes(_packed(weights)))
        write_bytes(building / STATE_TENSORS, to_bytes(_packed(state_tensors)))
        write_json(building / STATE_SCALARS, dict(state_scalars))
        files = {name: record_of(building / name) for name in (WEIGHTS, STATE_TENSORS, STATE_SCALARS)}
        manifest = Manifest(format_version=FORMAT_VERSION, run=run.path.name, files=files, **about)
        write_sealed(building / MANIFEST, manifest.as_json())
    return Checkpoint(final, manifest)


def _packed(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def record_of(file: Path) -> FileRecord:
    """A file's size and sha256, as manifests name them."""
    return FileRecord(bytes=file.stat().st_size, sha256=file_sha256(file))


def open_checkpoint(path: Path, but_shards: bool = False) -> Checkpoint:
    """The checkpoint in a folder, all its bytes verified.

    Args:
        but_shards: of a sharded one leave those files to whoever reads them, and look at their sizes alone: a rank
            needs a few of many.

    Raises:
        CodecmillError: a file is missing, cut, altered, or of a version that this codecmill does not read.
    """
    manifest = read_manifest(path)
    named = file_names(manifest)
    unread = {name for name in named if manifest.is_sharded and but_shards and name.endswith(".safetensors")}
    for name in named:
        check_file(path / name, manifest.files.get(name), only_size=name in unread)
    return Checkpoint(path, manifest, frozenset(unread))


def read_training_state(checkpoint: Checkpoint) -> TrainingState:
    """What a checkpoint's training had beside tensors.

    Raises:
        CodecmillError: it is damaged.
    """
    file = checkpoint.path / STATE_SCALARS
    try:
        return TrainingState.model_validate(read_json(file))
    except ValidationError as error:
        raise CodecmillError(f"{file} is damaged: {first_fault(error)}.") from error


def check_file(path: Path, expected: FileRecord | None, only_size: bool = False) -> None:
    """Compare a file of a checkpoint with what its manifest says of it.

    Raises:
        CodecmillError: it is another one.
    """
    if expected is None:
        raise CodecmillError(f"{path} is not named by its checkpoint.")
    how = difference(path, expected.bytes, None if only_size else expected.sha256)
    if how:
        raise CodecmillError(f"{path} {how}.")


def steps_on_disk(run: RunDirectory) -> list[int]:
    """The steps that have a checkpoint folder, sound or not, ascending."""
    names = {folder.name for folder in run.checkpoints.glob("step_*")}
    steps = {int(name[5:]) for name in names if name[5:].isdecimal()}
    return sorted(step for step in steps if step_name(step) in names)  # `step_10` is somebody else's


def readable_manifests(run: RunDirectory) -> Iterator[Manifest]:
    """What the checkpoints on disk say of themselves, newest first; of those whose manifest can be read."""
    for step in reversed(steps_on_disk(run)):
        with suppress(CodecmillError):
            yield read_manifest(folder_of(run, step))


def sound_checkpoints(run: RunDirectory, only_regular: bool = False) -> Iterator[Checkpoint]:
    """Newest first; damaged ones are skipped with a warning, and none is deleted.

    Args:
        only_regular: leave out those that a stop has left in between.
    """
    for step in reversed(steps_on_disk(run)):
        try:
            if not only_regular or read_manifest(folder_of(run, step)).is_regular:
                yield of_step(run, step)
        except CodecmillError as error:
            log.warning("Skipping a damaged checkpoint: %s", error)


def of_step(run: RunDirectory, step: int, but_shards: bool = False) -> Checkpoint:
    """The checkpoint of a step, its bytes verified; see `open_checkpoint`.

    Raises:
        CodecmillError: there is none, or it is damaged.
    """
    found = open_checkpoint(folder_of(run, step), but_shards)
    if found.step != step:
        raise CodecmillError(f"{found.path / MANIFEST} is of step {found.step}.")
    return found


def latest(run: RunDirectory) -> Checkpoint | None:
    """The newest checkpoint whose bytes are all as they were written, if any.

    Raises:
        CodecmillError: there are checkpoints, and every one of them is damaged.
    """
    newest = next(sound_checkpoints(run), None)
    if newest is None and steps_on_disk(run):
        raise CodecmillError(
            f"Every checkpoint in {run.checkpoints} is damaged. Nothing was deleted: restore one of them from a copy, "
            "or start a new run under another name."
        )
    return newest


def latest_regular(run: RunDirectory) -> Checkpoint | None:
    """The newest sound checkpoint but for those that a stop has left: the run that was not stopped has none there."""
    return next(sound_checkpoints(run, only_regular=True), None)


def best(run: RunDirectory) -> Checkpoint | None:
    """The best by validation (its PSNR; of a codec, its loss), else the newest."""
    newest = latest(run)
    if newest is None or newest.manifest.best is None:
        return newest
    try:
        return of_step(run, newest.manifest.best.step)
    except CodecmillError as error:
        log.warning("The best checkpoint cannot be used, the newest stands in: %s", error)
        return newest


def needed_by(run: RunDirectory, newest: Manifest) -> set[int]:
    """Steps whose checkpoints a run cannot do without beside the newest: the best, and the one that it may go back to.

    Args:
        newest: of the newest sound checkpoint.
    """
    needed = {newest.best.step} if newest.best else set()
    regular = last_regular(run, newest.step) if newest.may_go_back and not newest.is_regular else None
    return needed if regular is None else needed | {regular}


def last_regular(run: RunDirectory, before: int) -> int | None:
    """The step of the last regular checkpoint on disk before a step, by their manifests alone."""
    for step in reversed(steps_on_disk(run)):
        with suppress(CodecmillError):  # whoever reads it says that it is damaged
            if step < before and read_manifest(folder_of(run, step)).is_regular:
                return step
    return None


def retain(run: RunDirectory, newest: Checkpoint, keep_latest: int, spared: Collection[int] = ()) -> None:
    """Delete all but the newest `keep_latest` checkpoints, those that it needs, and those that somebody waits for.

    Args:
        newest: the newest sound one, which says which those are.
        spared: steps that stay in any case.
    """
    steps = steps_on_disk(run)
    kept = {*steps[-keep_latest:], newest.step, *needed_by(run, newest.manifest), *spared}
    for step in steps:
        if step not in kept:
            doomed = run.checkpoints / f".tmp-former-{step_name(step)}-{os.getpid()}"
            folder_of(run, step).rename(doomed)
            _remove(doomed)


def remove_leftovers(run: RunDirectory) -> None:
    """Delete what a killed process left half-written; only for the holder of the run's lock."""
    for leftover in run.checkpoints.glob(".tmp-*"):
        _remove(leftover)


def _remove(folder: Path) -> None:
    """Delete what is out of sight already; what cannot go now, as what somebody reads on NFS, goes another time."""
    if folder.is_symlink():
        folder.unlink()  # what was moved to another disk stays there
    else:
        shutil.rmtree(folder, ignore_errors=True)
