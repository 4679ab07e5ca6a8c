"""Verification and clean-up as tasks."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from pipelines.config import Section
from pipelines.errors import CodecmillError
from pipelines.run_directory import Root, RunDirectory
from tasks.progress import logged

if TYPE_CHECKING:
    from pipelines.provenance.ledger import Problem

LISTED = 20
"""Problems that a message lists."""

SHOWN = 1000
"""Rows of a table on Prefect's pages."""


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

    problems: dict[str, Problem] = {}
    read: set[Path] = set()
    # Also those that have lost their config, which is for the verification to say.
    runs = [run for run in map(RunDirectory, sorted(root.runs.glob("[!.]*/"))) if checkpoints.steps_on_disk(run)]
    files = size = 0
    with logged(), tempfile.TemporaryDirectory(prefix="codecmill-") as scratch:
        for run in runs:
            found = verify(find(run.path.name, root, Path(scratch), every=True), sources, but=read)
            files, size = files + found.files, size + found.bytes
            read |= {*found.shard_sets}
            problems |= {f"{each.file} {each.how}. {each.way_out}": each for each in found.problems}
    rows = [
        {"file": str(each.file), "what is wrong": each.how, "what to do": each.way_out} for each in problems.values()
    ]
    what = f"{files:,} files ({size:,} bytes) that the checkpoints of {len(runs)} runs come from"
    _show("verification", root, f"{len(problems)} of {what} are not as they were written", rows)
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
            log.warning("Left %s", each.path)
    cleaned = Cleaned(folders=tuple(each.path for each in gone), bytes=sum(each.bytes for each in gone))
    said = f"{len(gone)} folders ({cleaned.bytes:,} bytes) {'would go' if dry_run else 'were removed'}"
    rows = [{"kind": each.kind, "folder": str(each.path), "days": each.days, "bytes": each.bytes} for each in gone]
    _show("clean-up", root, said, rows)
    return cleaned


def _show(key: str, root: Root, said: str, rows: list[dict[str, Any]]) -> None:
    """Leave what was found on Prefect's page of the flow run; its page of the key has those of all flow runs."""
    create_table_artifact(rows[:SHOWN], key=key, description=f"Under {root.path}: {said}.")
