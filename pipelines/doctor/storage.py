"""The root: whether it can be written, locked and linked in, how much room it has, and what its clock says."""

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.doctor.findings import Finding, fault, good, note
from pipelines.run_directory import Root

LEAST_FREE = 2**30
"""Bytes: less, and the next checkpoint or shard may find no room."""
LITTLE_FREE = 10 * 2**30
WRONG_CLOCK_SECONDS = 5.0
"""By more than this a clock is said to be wrong."""


def examine_storage(root: Root) -> Iterator[Finding]:
    path = root.path.absolute()
    try:
        folder = next(each for each in (path, *path.parents) if each.exists())
        with tempfile.TemporaryDirectory(prefix=".tmp-doctor-", dir=folder) as scratch:
            yield good("root", f"{path} can be written")
            yield _locks(Path(scratch))
            yield from locks_of_other_hosts(folder, Path("/proc/self/mountinfo").read_text())
            yield _links(Path(scratch))
            yield _clock(Path(scratch))
            yield _room(folder)
    except OSError as error:
        remedy = "Choose another folder with --root, or make this one writable."
        yield fault("root", f"{path} cannot be written: {error.strerror}", remedy)


def _locks(scratch: Path) -> Finding:
    """Two descriptors of one file exclude each other, as two processes would."""
    descriptors = [os.open(scratch / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2)]
    try:
        fcntl.flock(descriptors[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptors[1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return good("locks", "hold")
    except OSError as error:
        remedy = "Keep the root on a file system with flock, or do not start two runs of one name."
        return fault("locks", f"the file system refuses them: {error.strerror}", remedy)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return fault("locks", "do not exclude each other here", "Keep the root on a file system with flock.")


def locks_of_other_hosts(folder: Path, mounts: str) -> Iterator[Finding]:
    """A note where a network file system is mounted so that its locks hold nobody off on other hosts.

    Args:
        mounts: `/proc/self/mountinfo`.
    """
    folder = folder.resolve()  # a root may be a link to where the file system is
    kind, options = "", set[str]()
    length = -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])  # of a space: \040
        if folder.is_relative_to(point) and len(point) >= length:
            length, kind = len(point), after.split()[0]
            options = set(after.split()[-1].split(","))
    local = {"nolock", "local_lock=flock", "local_lock=all"} & options
    if (kind.startswith("nfs") and local) or (kind == "lustre" and "flock" not in options):
        text = f"are this host's alone on {kind}" + (f", mounted with {', '.join(sorted(local))}" if local else "")
        remedy = "Do not work on one run from several hosts, or have the root mounted with locks that all of them see."
        yield note("locks of other hosts", text, remedy)


def _links(scratch: Path) -> Finding:
    (scratch / "one").write_bytes(b"")
    try:
        (scratch / "two").hardlink_to(scratch / "one")
    except OSError:
        remedy = "Unchanged tars are copied into a new shard set instead: it takes longer, and their room."
        return note("links", "the file system has no hard links", remedy)
    return good("links", "unchanged tars of a new shard set take no room")


def _clock(scratch: Path) -> Finding:
    before = time.time()
    (scratch / "now").write_bytes(b"")
    return compared_clock("clock of the root", (scratch / "now").stat().st_mtime - before)


def compared_clock(about: str, ahead: float) -> Finding:
    """Args: ahead: seconds by which the other clock is ahead of this machine's."""
    if abs(ahead) <= WRONG_CLOCK_SECONDS:
        return good(about, "agrees with this machine's")
    text = f"is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    return fault(about, text, "Have both follow a time server: schedules and charts go by them.")


def _room(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{free / 2**30:.1f} GiB free"
    if free < LEAST_FREE:
        return fault("room", text, "Make room, or choose another folder with --root.")
    if free < LITTLE_FREE:
        return note("room", text, "Shards take about 110 kB a patch of 256 pixels, checkpoints 12 bytes a parameter.")
    return good("room", text)
