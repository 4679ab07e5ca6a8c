"""Shards fetched before they are read: which come next is a function of the position in the sample order."""

import logging
import threading
from collections.abc import Sequence
from typing import Self

from pipelines.data.order import SampleOrder
from pipelines.data.shard_cache import NoRoomError, ShardCache
from pipelines.data.shard_format import ShardRow
from pipelines.errors import BusyError, CodecmillError

log = logging.getLogger("codecmill.storage")

PAUSE_SECONDS = 0.5
"""Between two looks at what is here, while something is missing."""


class ReadAhead:
    """While the `with` block runs, a thread keeps the window that is read and those that follow it in the cache.

    As many as fit: there should be room for two windows of `data.shuffle_window` shards, the one that is read and the
    next. It never fails: a shard that it could not fetch is fetched by whoever reads it.

    Args:
        rows: the training shards, as the order numbers them.
        position: in the order, from which on samples are read.
    """

    def __init__(self, cache: ShardCache, rows: Sequence[ShardRow], order: SampleOrder, position: int):
        self._cache, self._rows, self._order = cache, rows, order
        self._position = position
        self._moved = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._work, name="read-ahead", daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Not waited for: a store that stalls would keep a rank that was asked to stop from saving.
        self._ending = True
        self._moved.set()

    def reached(self, position: int) -> None:
        """Samples are read from a position on."""
        self._position = position
        if position >= self._until:
            self._moved.set()

    def _look(self) -> None:
        """Find out what is needed next: all shards of this window, then of the following ones while there is room."""
        windows = self._order.windows(self._position)
        _, current = next(windows)
        plan = dict.fromkeys(current)
        begin, following = next(windows)
        self._until = begin
        size = sum(self._rows[shard].bytes for shard in plan)
        while len(plan) < len(self._rows):
            for shard in following:
                if shard not in plan and size + self._rows[shard].bytes <= self._cache.limit:
                    plan[shard] = None
                    size += self._rows[shard].bytes
                elif shard not in plan:
                    self._plan = [self._rows[each] for each in plan]
                    return self._tell(current)
            _, following = next(windows)
        self._plan = [self._rows[each] for each in plan]
        return self._tell(current)

    def _tell(self, current: Sequence[int]) -> None:
        self._cache.needed_soon = frozenset(self._rows[shard].name for shard in current)

    def _work(self) -> None:
        while not self._ending:
            self._moved.clear()
            self._look()
            missing = [row for row in self._plan if not (self._ending or self._fetched(row))]
            self._moved.wait(PAUSE_SECONDS if missing else None)

    def _fetched(self, row: ShardRow) -> bool:
        """Fetch a shard unless another process does; whether it is here."""
        if self._cache.is_here(row):
            return True
        if self._moved.is_set():
            return False  # the plan is of yesterday
        try:
            self._cache.bring(row, wait=0, spared={each.name for each in self._plan})
        except (BusyError, NoRoomError):
            return False
        except (CodecmillError, OSError) as error:  # of this disk, where it is full for a moment, say
            log.warning("A shard could not be fetched ahead: %s", error)
            return False
        return True
