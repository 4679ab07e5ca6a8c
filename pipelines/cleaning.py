"""What nobody needs any more: shard sets that no run names, copies of images in a store that no run has looked at for
long, and, where it is asked for, old finished runs.

Only what has not been written into for some days; never the champion's run, one at work, or one that is not done. (What
killed builds of shard sets have left goes by itself: see pipelines.data.abandoned.)
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pipelines import checkpoints, tracking
from pipelines.config import Section
from pipelines.data.remote_images import LISTING
from pipelines.data.shard_format import MANIFEST
from pipelines.durable_files import reason_of
from pipelines.errors import BusyError, DiskFullError
from pipelines.locks import lock
from pipelines.run_directory import Root, RunDirectory
from pipelines.status import RunStatus, run_status
from pipelines.tolerant_reading import json_object, modified, size_of, text
from pipelines.tracking.marks import read_marks

log = logging.getLogger("codecmill.cleaning")

DAY = 24 * 3600.0
GOING = ".tmp-removed-"
SHARDS_DAYS = 2.0
"""So long a shard stage may still read the copies of images that it began with."""


class Removable(Section):
    """A folder that may go.

    Attributes:
        kind: `images` are copies of those of a bucket, and are fetched again when they are wanted; a `rest` is of a
            clean-up that was killed.
        bytes: of its files; those that another shard set shares stay on disk as long as that one does.
        days: since it was last written into.
    """

    kind: Literal["shard set", "images", "run", "rest"]
    path: Path
    bytes: int
    days: float


def find_removable(root: Root, days: float, runs: bool) -> list[Removable]:
    """What may go, runs first.

    Args:
        days: how long ago it must have been written into last.
        runs: finished runs, too; the shard sets that only they name may go with the next cleaning.

    Raises:
        TrackingUnavailable: with `runs`, where MLflow cannot say whose the champion is.
    """
    old_runs = _old_runs(root, days) if runs else ()
    return [*_rests(root), *old_runs, *_unnamed_sets(root, days), *_old_copies(root, days)]


def remove(found: Removable) -> bool:
    """Delete a folder; whether it is gone: it stays if somebody is at work in it now, or it is wanted since.

    It is renamed first, so that nobody ever finds half of it. Why it stays is told.
    """
    if found.kind == "rest":
        return _delete(found.path)
    if found.path.is_symlink():
        log.warning("%s stays: it is a link", found.path)
        return False
    if found.path.exists() and not os.access(found.path, os.W_OK):
        log.warning("%s stays: it may not be written", found.path)
        return False
    going = found.path.with_name(f"{GOING}{found.path.name}")
    held = (
        RunDirectory(found.path).locked(wait=0)
        if found.kind == "run"
        else lock(found.path.with_name(f".tmp-{found.path.name}.lock"), found.path.name, wait=0)
    )
    try:
        with held:
            found.path.rename(going)
            if found.kind == "shard set" and _is_wanted(going, found):
                going.rename(found.path)
                log.warning("%s stays: a run has begun to use it", found.path)
                return False
            return _delete(going)
    except FileNotFoundError:  # another cleaning was here first
        return False
    except BusyError:
        log.warning("%s stays: somebody is at work in it", found.path)
        return False
    except (DiskFullError, OSError) as error:  # another user's, perhaps
        log.warning("%s stays: %s", found.path, reason_of(error))
        return False


def _is_wanted(going: Path, found: Removable) -> bool:
    """Whether a run has begun to use a shard set since it was listed: it names it, or has just found it made."""
    named = _named_sets(Root(found.path.parent.parent))
    return named is None or found.path.name in named or _days_since(modified(going / MANIFEST)) < found.days


def _delete(folder: Path) -> bool:
    """Delete a folder that is out of sight; whether it is gone. What cannot go is told, and keeps nothing else."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:  # another cleaning is at it
        return not folder.exists()
    except OSError as error:
        log.warning("%s cannot be removed: %s", folder, error)
        return False
    return True


def _rests(root: Root) -> Iterator[Removable]:
    for path in (path for folder in (root.runs, root.shards, root.images) for path in folder.glob(f"{GOING}*/")):
        yield Removable(kind="rest", path=path, bytes=size_of(path), days=_days_since(modified(path)))


def _old_runs(root: Root, days: float) -> Iterator[Removable]:
    champion = None if tracking.is_unmade(root) else tracking.champion(root)  # whoever only looks makes no database
    for run in root.all_runs():
        age = _days_since(max(modified(path) for path in (run.path, *run.path.glob("*"))))
        status = run_status(run)
        if age >= days and status.state == "done" and not _is_spared(run, status, champion):
            yield Removable(kind="run", path=run.path, bytes=status.size, days=age)


def _is_spared(run: RunDirectory, status: RunStatus, champion: tracking.Version | None) -> bool:
    """The champion's, one that may be, and what went on from it: by that a watch knows that it need not try again."""
    if champion is None:
        return status.alias == "champion" or _is_on_a_server(run)
    if champion.run == status.name and champion.run_id == status.mlflow_run:
        return True
    newest = next(checkpoints.readable_manifests(run), None)
    return _is_on_a_server(run) or (newest is not None and newest.parent == champion.checkpoint_sha256)


def _is_on_a_server(run: RunDirectory) -> bool:
    """Whether a server knows it that the environment does not name now, and may have it as the champion."""
    marks = read_marks(run)
    address = marks.tracking_uri if marks else ""
    if not tracking.is_server(address) or tracking.is_current(address, run.root):
        return False
    log.warning(
        "Run '%s' stays: MLflow at %s, which MLFLOW_TRACKING_URI does not name, may have it as the champion.",
        *(run.path.name, address),
    )
    return True


def _unnamed_sets(root: Root, days: float) -> Iterator[Removable]:
    named = _named_sets(root)
    if named is None:
        return
    for file in sorted(root.shards.glob(f"[0-9a-f]*/{MANIFEST}")):
        age = _days_since(modified(file))
        if age >= days and file.parent.name not in named:
            yield Removable(kind="shard set", path=file.parent, bytes=size_of(file.parent), days=age)


def _old_copies(root: Root, days: float) -> Iterator[Removable]:
    """Each look at a bucket's images writes the list of what is here of them; shards are cut from them after it."""
    for file in sorted(root.images.glob(f"[!.]*/{LISTING}")):
        age = _days_since(modified(file))
        if age >= max(days, SHARDS_DAYS):
            yield Removable(kind="images", path=file.parent, bytes=size_of(file.parent), days=age)


def _named_sets(root: Root) -> set[str] | None:
    """The folders of the shard sets that any run under the root names, also by its checkpoints, whatever has become of
    the rest of that run; None where one does not say which it was made of.

    By name, for the root may have been moved since.
    """
    named: set[str] = set()
    for run in map(RunDirectory, root.runs.glob("*/")):
        file = run.shard_set_file
        path = text(json_object(file.read_bytes()), "path") if file.is_file() else None
        its = {Path(path).name} if path is not None and "\0" not in path else set()
        its |= {manifest.shard_set[:16] for manifest in checkpoints.readable_manifests(run)}
        if not its and (file.exists() or checkpoints.steps_on_disk(run)):
            log.warning("No shard set is removed: run '%s' no longer says which is its own.", run.path.name)
            return None
        named |= its
    return named


def _days_since(seconds: float) -> float:
    return (time.time() - seconds) / DAY
