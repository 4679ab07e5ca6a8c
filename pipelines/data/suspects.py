"""Shards in which a reader has met damage: a mark beside them has the shard stage look at all, and make those anew."""

from contextlib import suppress
from pathlib import Path

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


def clear(folder: Path) -> None:
    """Take the marks away: every shard is as it was written."""
    for file in folder.glob(f"*{SUFFIX}"):
        file.unlink(missing_ok=True)
