"""Which checkpoint somebody means: a folder, a run's name, or an address in MLflow; found on this machine if it is."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines import checkpoint_format, checkpoints, tracking
from pipelines.durable_files import read_json
from pipelines.errors import CodecmillError, InputError
from pipelines.run_directory import Root, RunDirectory
from pipelines.tolerant_reading import exists, is_dir, is_file

log = logging.getLogger("codecmill.provenance")

ADDRESSES = ("models:/", "runs:/")


@dataclass(frozen=True)
class Found:
    """What was meant.

    Attributes:
        folders: of checkpoints; several where all of a run are wanted.
        run: the run that they lie in; None for a checkpoint that was copied out of its run.
        root: where its shard set and its parent are looked for.
        how: how an address was understood, in a few words; empty for a folder or a run.
    """

    folders: tuple[Path, ...]
    run: RunDirectory | None
    root: Root
    how: str = ""


def find(what: str, root: Root, scratch: Path, every: bool = False) -> Found:
    """The checkpoint that `what` means.

    Args:
        what: a checkpoint's folder, a run's name or folder, `models:/name@alias`, `models:/name/3` or `runs:/...`.
        scratch: an empty folder, for a checkpoint that only MLflow has.
        every: a run means all its checkpoints, not its best one.

    Raises:
        InputError: it is none of these.
        CodecmillError: the run has no checkpoint.
    """
    if what.startswith(ADDRESSES):
        return _at_address(what, root, scratch)
    place = Path(what).absolute()
    if place.name in (checkpoint_format.MANIFEST, checkpoint_format.WEIGHTS, checkpoint_format.SHARDING):
        place = place.parent
    if exists(place / checkpoint_format.MANIFEST) or (is_dir(place) and place.parent.name == "checkpoints"):
        return found_at(place, root)
    run = _run(what, place, root)
    folders = tuple(checkpoints.folder_of(run, step) for step in checkpoints.steps_on_disk(run))
    if not folders:
        raise CodecmillError(f"Run '{run.path.name}' has no checkpoint yet. Train it: {run.command('resume')}")
    return Found(folders if every else (_best(run, folders),), run, run.root)


def _run(what: str, place: Path, root: Root) -> RunDirectory:
    """The run of a name or folder; also one that has lost its config, as that is for `verify` to say."""
    named = [root.run(what)] if Path(what).name == what else []
    run = next((run for run in [RunDirectory(place), *named] if is_dir(run.checkpoints)), None)
    if run is None and is_dir(place) and "/" in what and not is_file(place / "config.json"):
        raise InputError(
            f"{place} is no checkpoint: it has no {checkpoint_format.MANIFEST}. Name its folder, or a run."
        )
    return run or root.existing_run(what)


def found_at(folder: Path, root: Root, how: str = "") -> Found:
    """A checkpoint's folder, with the run that it lies in if it lies in one."""
    run = RunDirectory(folder.parent.parent)
    marks = (run.config_file, run.shard_set_file, run.journal)
    if folder.parent == run.checkpoints and any(mark.exists() for mark in marks):
        return Found((folder,), run, run.root, how)
    return Found((folder,), None, root, how)


def _all_checkpoints(root: Root) -> Iterator[tuple[Path, str]]:
    """Every readable checkpoint under a root: its folder and the sha256 of its weights."""
    for run in root.all_runs():
        for step in reversed(checkpoints.steps_on_disk(run)):
            folder = checkpoints.folder_of(run, step)
            weights = _weights_of(folder)
            if weights:
                yield folder, weights


def readable(folder: Path) -> checkpoint_format.Manifest | None:
    try:
        return checkpoint_format.read_manifest(folder)
    except CodecmillError:
        return None


def _weights_of(folder: Path) -> str | None:
    manifest = readable(folder)
    return checkpoint_format.weights_sha256(manifest) if manifest else None


def _best(run: RunDirectory, folders: tuple[Path, ...]) -> Path:
    """As `checkpoints.best`, but without a look at the weights, which may take long; else the newest."""
    newest = next(((folder, manifest) for folder in reversed(folders) if (manifest := readable(folder))), None)
    if newest is None:
        return folders[-1]
    folder, manifest = newest
    best = checkpoints.folder_of(run, manifest.best.step) if manifest.best else folder
    return best if readable(best) else folder


def _at_address(address: str, root: Root, scratch: Path) -> Found:
    """What MLflow calls so, without a copy out of it where the checkpoint is under the root."""
    if not address.startswith("models:/"):
        sent = _sent(address, root)
        return found_at(sent[0], root, sent[1]) if sent else _fetched(address, root, scratch, "MLflow")
    registered = tracking.registered_offline(address, root)
    # A server is asked of numbers, too: with a new database it begins at 1 again.
    if registered is None and tracking.is_unmade(root) and (written := _promoted(address, root)):
        return found_at(written[0], root, written[1])
    try:
        registered = registered or tracking.registered(address, root)
    except tracking.TrackingUnavailable as error:
        written = _promoted(address, root)
        if written is None:
            raise
        log.warning("%s is taken for %s: %s", address, written[1], error)
        return found_at(written[0], root, written[1])
    how = f"version {registered.number} in {tracking.shown_place(root)}"
    sent = _sent(registered.source, root)
    is_it = sent is not None and _weights_of(sent[0]) == registered.checkpoint_sha256
    folder = sent[0] if sent and is_it else with_weights(registered.checkpoint_sha256, root)
    return found_at(folder, root, how) if folder else _fetched(address, root, scratch, how)


def _fetched(address: str, root: Root, scratch: Path, how: str) -> Found:
    folder = tracking.fetch_checkpoint(address, root, scratch)
    weights = _weights_of(folder)
    own = with_weights(weights, root) if weights else None
    return found_at(own, root, how) if own else Found((folder,), None, root, f"{how}, as a copy out of MLflow")


def all_with_weights(sha256: str, root: Root) -> Iterator[Path]:
    """The checkpoints under a root whose manifests name these weights; whether they hold them is not looked at."""
    return (folder for folder, weights in _all_checkpoints(root) if weights == sha256)


def with_weights(sha256: str, root: Root) -> Path | None:
    """The first of them, if there is one."""
    return next(all_with_weights(sha256, root), None)


def _promoted(address: str, root: Root) -> tuple[Path, str] | None:
    """A version by what the runs wrote down when they were registered on the server that is in use."""
    match = tracking.MODEL_ADDRESS.fullmatch(address)
    if match is None or match[1] != tracking.MODEL:
        return None
    candidates: list[tuple[int, RunDirectory, str]] = []
    for run in reversed(root.all_runs()):  # of those with one number, from before and after its loss, the newest first
        promotion, marks = _values(run.promotion_file), _values(run.mlflow_file)
        version = promotion.get("version")
        is_meant = promotion.get("alias") == match[2] if match[2] else version == int(match[3])
        if is_meant and isinstance(version, int) and tracking.is_current(str(marks.get("tracking_uri")), root):
            candidates.append((version, run, str(promotion.get("checkpoint_sha256"))))
    if match[3] and len({sha256 for _, _, sha256 in candidates}) > 1:
        return None  # a number that was given twice
    for version, run, sha256 in sorted(candidates, key=lambda each: each[0], reverse=True):
        folder = with_weights(sha256, root)
        if folder:
            return folder, f"version {version}, as {run.promotion_file} says"
    return None


def _sent(address: str, root: Root) -> tuple[Path, str] | None:
    """A checkpoint by the MLflow run that its own run was sent to; without a path the newest."""
    match = tracking.RUN_ADDRESS.fullmatch(address)
    for run in root.all_runs() if match else ():
        marks = _values(run.mlflow_file)
        if match and match[1] and marks.get("run_id") == match[1]:
            folders = [checkpoints.folder_of(run, step) for step in reversed(checkpoints.steps_on_disk(run))]
            sent = marks.get("checkpoints")
            weights = sent.get(match[2].rpartition("/")[2]) if isinstance(sent, dict) else None
            for folder in folders:
                # A step may have been trained again since, to other bits.
                is_it = _weights_of(folder) == weights if weights else match[2] in ("", f"checkpoints/{folder.name}")
                if is_it:
                    return folder, f"the MLflow run of '{run.path.name}'"
    return None


def _values(file: Path) -> dict[str, object]:
    try:
        value = read_json(file) if file.is_file() else {}
    except CodecmillError:
        return {}
    return value if isinstance(value, dict) else {}
