"""What became of a run, from the store: its evaluations, and which version it is registered as."""

import logging
from pathlib import Path
from typing import Any

from pipelines import checkpoints
from pipelines.durable_files import built_folder, write_bytes, write_json
from pipelines.errors import CodecmillError, DiskFullError
from pipelines.evaluation.contents import PICTURES, RESULT, parse_contents, read_contents
from pipelines.run_directory import RunDirectory
from pipelines.storage import keys
from pipelines.storage.objects import Object, digests
from pipelines.storage.patience import MissingObject, StoreFailed
from pipelines.storage.store import Store
from pipelines.tolerant_reading import json_object, number
from pipelines.tracking import is_current
from pipelines.tracking.marks import read_marks

log = logging.getLogger("codecmill.storage")

MOST_PICTURE_BYTES = 256 * 2**20
"""Of an evaluation's pictures, where they come along: who goes on with a run does not wait for more."""


def bring_results(run: RunDirectory, store: Store) -> None:
    """Bring what a run's folder lacks of its results; the checkpoints come first.

    Raises:
        StoreFailed: the store fails. StoreError: it does not let us. DiskFullError: there is no room for it here.
    """
    _bring_evaluations(run, store)
    _bring_promotion(run, store)


def of_run(run: RunDirectory, store: Store, name: str) -> dict[str, Any]:
    """The object in a file of a run's folder; empty where the store has no such file.

    Raises:
        StoreError: it cannot be had. CodecmillError: it holds none.
    """
    try:
        return store.read_object(keys.of_run(run.path.name, name))
    except MissingObject:
        return {}


def _bring_evaluations(run: RunDirectory, store: Store) -> None:
    """Those of the checkpoints that are here, but where a later one is here."""
    here = checkpoints.steps_on_disk(run)
    for name, (step, about) in keys.complete_evaluations(store, run.path.name).items():
        if step not in here:
            continue
        folder = run.evaluations / name
        try:
            if _is_wanted(folder, about, store):
                _bring_evaluation(folder, about, store)
        except (StoreFailed, DiskFullError):
            raise
        except CodecmillError as error:
            log.warning("Skipping an evaluation in the store: %s", error)


def _is_wanted(folder: Path, about: Object, store: Store) -> bool:
    """Whether there is no evaluation here, none that can be read, or an earlier one."""
    try:
        here = read_contents(folder)
    except CodecmillError:
        return True
    if digests(folder / RESULT).etag == about.etag:
        return False
    return parse_contents(store.read(about.key), store.address(about.key)).made > here.made


def _bring_evaluation(folder: Path, about: Object, store: Store) -> None:
    """An evaluation, if all its bytes are as they were written; of very large pictures only the report's small ones."""
    content = store.read(about.key)
    files = parse_contents(content, store.address(about.key)).files
    pictures = [name for name in files if name.startswith(f"{PICTURES}/")]
    size = sum(files[name].bytes for name in pictures)
    left = pictures if size > MOST_PICTURE_BYTES else []
    if left:
        log.info("The %d pictures of %s stay in %s: they have %d bytes", len(left), folder, store.url, size)
    with built_folder(folder) as building:
        for name in files.keys() - left:
            key = f"{about.key.removesuffix(RESULT)}{name}"
            store.fetch(key, building / name, files[name].bytes, files[name].sha256)
        write_bytes(building / RESULT, content)


def _bring_promotion(run: RunDirectory, store: Store) -> None:
    """Which version it is registered as, where its MLflow run is the one that it has here, too."""
    marks, here = of_run(run, store, run.mlflow_file.name), read_marks(run)
    if here is None or marks.get("run_id") != here.run_id or not is_current(str(marks.get("tracking_uri")), run.root):
        return
    there = of_run(run, store, run.promotion_file.name)
    known = json_object(run.promotion_file.read_bytes()) if run.promotion_file.is_file() else {}
    if (number(there, "version") or 0) > (number(known, "version") or 0):
        write_json(run.promotion_file, there)
