"""Shards in which a reader has met damage: a mark beside them has all look, and the shard stage make them anew."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from pipelines.data.shard_format import ShardRow
from pipelines.data.shard_verification import verify_shard

SUFFIX = ".suspect"


def mark(folder: Path, shard: str) -> bool:
    """Leave a mark for a shard of a set; returns whether that was possible, for the set may be read-only."""
    with suppress(OSError):
        (folder / f"{shard}{SUFFIX}").touch()
        return True
    return False


def marked(folder: Path) -> list[str]:
    """The names of the shards that have a mark."""
    return sorted(file.name.removesuffix(SUFFIX) for file in folder.glob(f"*{SUFFIX}"))


def still_damaged(folder: Path, rows: Iterable[ShardRow]) -> list[str]:
    """Those of the marked shards that are damaged, all of them read again; the others lose their marks.

    They were restored from a copy, or a disk far away had given other bytes, or fewer, once.
    """
    names = marked(folder)
    damaged = [row.name for row in rows if row.name in names and any(verify_shard(folder, row))]
    for name in set(names) - set(damaged):
        with suppress(OSError):  # the set may be read-only by now
            (folder / f"{name}{SUFFIX}").unlink(missing_ok=True)
    return damaged


def clear(folder: Path) -> None:
    """Take the marks away: every shard is as it was written."""
    for file in folder.glob(f"*{SUFFIX}"):
        file.unlink(missing_ok=True)
