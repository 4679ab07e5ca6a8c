"""What builds of shard sets that were killed have left behind, and nobody came back for."""

import shutil
import time
from contextlib import suppress
from pathlib import Path

from pipelines.errors import BusyError, DiskFullError
from pipelines.locks import lock

ABANDONED_SECONDS = 7 * 24 * 3600.0
"""Until then what is encoded already waits for the same build to be tried again."""


def remove_abandoned(shards: Path) -> None:
    """Delete working folders that no process holds, and that none has written into for a week.

    On a shared root those of others may not be ours to delete: they stay.
    """
    for folder in shards.glob(".tmp-*/"):
        held = lock(folder.with_name(f"{folder.name}.lock"), folder.name, wait=0.0)
        with suppress(BusyError, DiskFullError, OSError), held:
            if time.time() - _last_written(folder) > ABANDONED_SECONDS:
                shutil.rmtree(folder)


def _last_written(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.glob("parts")))
