"""How many cores a process can keep busy: those that it may run on, or what its container's quota comes to."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath


def usable_cores(root: Path = Path("/")) -> int:
    """A count, at least 1. A container with a quota of CPU time still sees all cores of its host.

    Threads on all of them would use its quota up in a moment, and then all stand still until the next period.

    Args:
        root: where `proc` and `sys` are.
    """
    return min((len(os.sched_getaffinity(0)), *(max(1, math.ceil(quota)) for quota in _quotas(root))))


def _quotas(root: Path) -> Iterator[float]:
    """What this process's control group, and those above it, may use, in cores (cgroups(7), version 1 and 2)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        # A container's own group may be the mount itself, and have another path on the host.
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            yield from _quota(mount / group.relative_to("/"))


def _quota(folder: Path) -> Iterator[float]:
    """Of one control group, if it has any."""
    with suppress(OSError, ValueError):  # "max" is none
        quota, period = map(int, (folder / "cpu.max").read_text().split())
        yield quota / period
    with suppress(OSError, ValueError):
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        if quota > 0:  # -1 is none
            yield quota / period
