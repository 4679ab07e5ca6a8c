"""A run from the store: on a machine that has nothing of it, or less than another machine has sent since."""

import logging
import re
import tempfile
from pathlib import Path

from pipelines import checkpoints
from pipelines.checkpoint_format import MANIFEST, Manifest, file_names, read_manifest
from pipelines.data import other_manifests, remote_sets, shard_format
from pipelines.durable_files import built_folder, write_bytes, write_json
from pipelines.errors import CodecmillError, DiskFullError
from pipelines.file_digests import file_sha256
from pipelines.run_directory import RunDirectory
from pipelines.storage import keys
from pipelines.storage.address import store_url
from pipelines.storage.bringing_results import bring_results, of_run
from pipelines.storage.journal_pieces import bring_journal
from pipelines.storage.patience import MissingObject, StoreError, StoreFailed
from pipelines.storage.sameness import config_in_store, must_be_one
from pipelines.storage.store import Store, open_store
from pipelines.tracking import is_current

log = logging.getLogger("codecmill.storage")

CONFIG = "config.json"
_FINGERPRINT = re.compile("[0-9a-f]{64}")
_OTHER_MANIFEST = re.compile(r"([0-9a-f]{64})\.json")


def catch_up(run: RunDirectory) -> None:
    """`bring`, from the store that the environment names, if any; what is here goes on without a store that fails.

    Must be called by the holder of the run's lock.

    Raises:
        StoreError: the store fails, and nothing of the run is here.
    """
    url = store_url()
    if url is None:
        return
    try:
        brought = bring(run, open_store(url))
    except StoreError as error:
        if not run.config_file.is_file():
            raise
        log.warning("Going on with what is here of the run: %s", error)
    else:
        if brought is not None:
            log.info("Brought step %d of '%s' from %s", brought.step, run.path.name, url)


def is_in_store(name: str) -> bool:
    """Whether the store that the environment names, if any, has a run.

    Raises:
        StoreError: the store does not say.
    """
    url = store_url()
    return url is not None and open_store(url).find(keys.of_run(name, CONFIG)) is not None


def bring(run: RunDirectory, store: Store) -> checkpoints.Checkpoint | None:
    """Bring what a run's folder lacks: config, shard set (its shards only when they are read), which MLflow run it is,
    journal and the newest checkpoint that is whole, if it is newer than the newest here, the best that it names, the
    one that it may go back to, their evaluations, and which version it is registered as.

    Must be called by the holder of the run's lock.

    Returns:
        The checkpoint that was brought, if any.

    Raises:
        StoreFailed: the store fails. StoreError: it does not let us. DiskFullError: there is no room for it here.
        InputError: the run of this name here is another one.
    """
    config = config_in_store(run, store)
    if config is None:
        return None
    is_new = not run.config_file.is_file()
    if not is_new:
        must_be_one(run, store, config)
    _bring_shard_set(run, store)
    _bring_marks(run, store)
    newest = next(checkpoints.sound_checkpoints(run), None)
    brought = _bring_newest(run, store, newest.step if newest else -1)
    if not is_new and (brought is not None or config.training.steps > run.read_config().training.steps):
        run.write_config(config)  # with what has been changed there since, such as more steps
    if newest := brought or newest:
        _bring_needed(run, store, newest.manifest)
    bring_results(run, store)
    if is_new:  # last: where the store fails on the way no run is here, and the next time it is brought to its end
        run.write_config(config)
    return brought


def _bring_newest(run: RunDirectory, store: Store, here: int) -> checkpoints.Checkpoint | None:
    """The newest whole checkpoint in a store, if it is of a later step than `here`; before it the journal, which has
    the lines of all of them.
    """
    newer = [step for step in keys.complete_steps(store, run.path.name) if step > here]
    if newer:
        try:
            bring_journal(run, store)
        except MissingObject as error:
            log.warning("The training goes on without the figures of its earlier steps: %s", error)
    found = (_bring_checkpoint(run, store, step) for step in reversed(newer))
    return next(filter(None, found), None)


def _bring_shard_set(run: RunDirectory, store: Store) -> None:
    """Make the run's shard set known here: its manifest, and where the rest is."""
    if run.shard_set_file.is_file():
        if (run.shard_set() / shard_format.MANIFEST).is_file():
            _bring_other_manifests(run.shard_set(), store)
        return
    key = keys.of_run(run.path.name, run.shard_set_file.name)
    try:
        recorded = store.read_object(key)
    except MissingObject:
        return  # the run was stopped before it had one
    fingerprint = str(recorded.get("fingerprint"))
    if not _FINGERPRINT.fullmatch(fingerprint):  # it becomes a folder's name
        raise CodecmillError(f"{store.address(key)} names no shard set: '{fingerprint[:80]}' is no fingerprint.")
    folder = run.root.shards / fingerprint[:16]
    try:
        make_set_known(folder, store)
    except MissingObject as error:
        raise CodecmillError(
            f"{store.url} has run '{run.path.name}', but its shard set {fingerprint[:16]} not whole yet. Let the "
            "machine that has it send it: codecmill sync RUN"
        ) from error
    found = shard_format.Manifest.read(folder).fingerprint
    if found != fingerprint:
        raise CodecmillError(
            f"{folder} is shard set {found[:32]}, but the run in {store.url} began with {fingerprint}."
        )
    _bring_other_manifests(folder, store)
    write_json(run.shard_set_file, {"fingerprint": fingerprint, "path": str(folder.absolute())})


def _bring_other_manifests(folder: Path, store: Store) -> None:
    """Those that checkpoints from other machines name the set by; the store's own too, where the set was made here."""
    prefix, own = keys.of_other_manifests(folder, ""), keys.of_shard_set(folder, shard_format.MANIFEST)
    there = {each.key.removeprefix(prefix): each.key for each in store.list(prefix)}
    found = store.find(own)
    if found is not None and found.sha256 != file_sha256(folder / shard_format.MANIFEST):
        there[f"{found.sha256}.json"] = own
    for name, key in there.items():
        named = _OTHER_MANIFEST.fullmatch(name)
        if named and not (file := other_manifests.file_of(folder, named[1])).is_file():
            file.parent.mkdir(exist_ok=True)
            write_bytes(file, store.read(key))


def make_set_known(folder: Path, store: Store) -> None:
    """Have a shard set's manifest in its folder here, if it is not there, and where the rest is.

    Raises:
        MissingObject: the store has no such set. StoreError: it cannot be had.
    """
    if not (folder / shard_format.MANIFEST).is_file():
        content = store.read(keys.of_shard_set(folder, shard_format.MANIFEST))
        remote_sets.make_known(folder, f"{store.url}/{keys.of_shard_set(folder)}", content)


def _bring_marks(run: RunDirectory, store: Store) -> None:
    """Make known here which MLflow run it is, where that is the MLflow of this machine, too."""
    if run.mlflow_file.is_file():
        return
    marks = of_run(run, store, run.mlflow_file.name)
    if is_current(str(marks.get("tracking_uri")), run.root):
        write_json(run.mlflow_file, marks)


def _bring_checkpoint(run: RunDirectory, store: Store, step: int) -> checkpoints.Checkpoint | None:
    """A checkpoint, if all its bytes are as they were saved."""
    folder = checkpoints.folder_of(run, step)
    name = run.path.name
    try:
        with built_folder(folder) as building:
            write_bytes(building / MANIFEST, store.read(keys.of_checkpoint(name, step, MANIFEST)))
            manifest = read_manifest(building)
            if manifest.step != step:
                raise CodecmillError(f"{store.address(keys.of_checkpoint(name, step))} is of step {manifest.step}.")
            for file in file_names(manifest):
                record = manifest.files.get(file)
                if record is None:
                    raise CodecmillError(f"{store.address(keys.of_checkpoint(name, step))} names no {file}.")
                store.fetch(keys.of_checkpoint(name, step, file), building / file, record.bytes, record.sha256)
        return checkpoints.open_checkpoint(folder)
    except (StoreFailed, DiskFullError):
        raise  # what is there may be whole: going back to an older one would do its steps again
    except CodecmillError as error:
        log.warning("Skipping a checkpoint in the store: %s", error)
        return None


def _bring_needed(run: RunDirectory, store: Store, newest: Manifest) -> None:
    """What a run cannot do without beside the newest: the best, and the one that it may go back to."""
    best = newest.best.step if newest.best else None
    is_lacking = best is not None and best not in checkpoints.steps_on_disk(run)
    if is_lacking and best in keys.complete_steps(store, run.path.name):
        _bring_checkpoint(run, store, best)
    if newest.may_go_back and not newest.is_regular:
        _bring_last_regular(run, store, newest.step)


def _bring_last_regular(run: RunDirectory, store: Store, before: int) -> None:
    """Which it is their manifests say; those that stops have left after it stay where they are."""
    here = checkpoints.last_regular(run, before)
    for step in reversed([step for step in keys.complete_steps(store, run.path.name) if step < before]):
        if here is not None and here >= step:
            return
        if _is_regular(run, store, step) and _bring_checkpoint(run, store, step):
            return


def _is_regular(run: RunDirectory, store: Store, step: int) -> bool:
    """What the manifest of a checkpoint says that lies in the store, and is looked at alone."""
    with tempfile.TemporaryDirectory(prefix="codecmill-") as folder:
        (Path(folder) / MANIFEST).write_bytes(store.read(keys.of_checkpoint(run.path.name, step, MANIFEST)))
        try:
            return read_manifest(Path(folder)).is_regular
        except CodecmillError as error:
            log.warning("Skipping a checkpoint in the store: %s", error)
            return False
