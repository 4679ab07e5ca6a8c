"""One writer a run, on whatever host it is: the first rank, for as long as it holds a lock in the run's folder."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from pipelines import checkpoints
from pipelines.errors import DiskFullError, RankFailure
from pipelines.locks import lock
from pipelines.run_directory import RunDirectory
from pipelines.training.distributed import Ranks

PATIENCE_SECONDS = 120.0
"""How long a first rank waits for the former one to end: longer than a host takes to notice that it was cut off, and
than an NFS server keeps the locks of a client that is gone (90 s)."""


@contextmanager
def sole_writer(directory: RunDirectory, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Have the first rank of these ranks be the only one that writes; all wait until it is.

    Yields a check for the first rank, to be made before something is published: a file system may give the lock of a
    host that it has not heard from to another, which writes its own name into the file.

    Raises:
        BusyError: on the first rank; that of other ranks, of another host perhaps, still writes. DiskFullError: on the
            first rank; there is no room for its name.
    """
    if not ranks.is_first:
        dist.barrier()
        yield _nothing
        return
    with lock(directory.writer_file, f"The training of '{directory.path.name}'", PATIENCE_SECONDS):
        checkpoints.remove_leftovers(directory)
        mine = directory.writer_file.read_bytes()
        if not mine:  # the disk is full, see locks.py; without a name nobody could tell that another has taken over
            raise DiskFullError(
                f"There is no room in {directory.path} for the name of the process that writes. What was saved before "
                f"is untouched. Make room there, then go on with: {directory.command('resume')}"
            )
        dist.barrier()  # now nobody else adds a checkpoint while the ranks look for the newest
        yield lambda: _check(directory.writer_file, mine)


def _nothing() -> None:
    pass


def _check(file: Path, mine: bytes) -> None:
    now = file.read_bytes()
    if now != mine:
        raise RankFailure(
            f"This rank was out of touch for so long that another has taken over the run: {file} names "
            f"process {now.decode('ascii', 'replace').strip()}. It saves nothing more."
        )
