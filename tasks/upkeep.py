"""Verification and clean-up as tasks."""

import tempfile
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from pipelines.config import Section
from pipelines.errors import CodecmillError
from pipelines.run_directory import Root
from tasks.progress import logged

LISTED = 20
"""Problems that a message lists."""


class Verified(Section):
    """How much was read, and found as it was written."""

    runs: int
    files: int
    bytes: int


class Cleaned(Section):
    """Folders that went, or would have gone, and their size."""

    folders: tuple[Path, ...]
    bytes: int


@task(name="verify", timeout_seconds=24 * 3600, cache_policy=NO_CACHE, persist_result=False)
def verify_all(root: Root, sources: bool) -> Verified:
    """Verify every checkpoint of every run, and all that they come from.

    Raises:
        CodecmillError: something has changed; lists what.
    """
    from pipelines import checkpoints
    from pipelines.provenance.locating import find
    from pipelines.provenance.verifying import verify

    problems: dict[str, None] = {}
    read: set[Path] = set()
    runs = [run for run in root.all_runs() if checkpoints.steps_on_disk(run)]
    files = size = 0
    with logged(), tempfile.TemporaryDirectory(prefix="codecmill-") as scratch:
        for run in runs:
            found = verify(find(run.path.name, root, Path(scratch), every=True), sources, but=read)
            files, size = files + found.files, size + found.bytes
            read |= {*found.shard_sets}
            problems |= dict.fromkeys(f"{each.file} {each.how}. {each.way_out}" for each in found.problems)
    if problems:
        more = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise CodecmillError(
            f"{len(problems)} of the files that runs come from are not as they were written:\n  "
            + "\n  ".join(list(problems)[:LISTED])
            + more
        )
    return Verified(runs=len(runs), files=files, bytes=size)


@task(name="clean up", timeout_seconds=3600, cache_policy=NO_CACHE, persist_result=False)
def clean_up(root: Root, days: float, runs: bool, dry_run: bool) -> Cleaned:
    """Remove what nobody needs, or say what that is."""
    from pipelines.cleaning import find_removable, remove

    log = get_run_logger()
    gone = []
    for each in find_removable(root, days, runs):
        if dry_run or remove(each):
            log.info(
                "%s the %s %s, %.1f days old, %s bytes",
                "Would remove" if dry_run else "Removed",
                each.kind,
                each.path,
                each.days,
                f"{each.bytes:,}",
            )
            gone.append(each)
        else:
            log.warning("Left %s, where somebody is at work", each.path)
    return Cleaned(folders=tuple(each.path for each in gone), bytes=sum(each.bytes for each in gone))
