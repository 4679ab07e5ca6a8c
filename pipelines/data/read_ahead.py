"""Shards fetched before they are read: which come next is a function of the position in the sample order."""

import logging
import threading
from collections.abc import Sequence
from itertools import islice, takewhile
from typing import Self

from pipelines.data.order import SampleOrder
from pipelines.data.shard_cache import CACHE_BYTES, NoRoomError, ShardCache
from pipelines.data.shard_format import ShardRow
from pipelines.errors import BusyError, CodecmillError

log = logging.getLogger("codecmill.storage")

PAUSE_SECONDS = 0.5
"""Between two looks at what is here, while another process fetches some of it."""

LONG_PAUSE_SECONDS = 10.0
"""Between two looks where nothing is missing, or something could not be fetched: to find no room among 10,000 shards
takes 60 ms, in which nobody else can look for it."""


class ReadAhead:
    """While the `with` block runs, a thread keeps the window that is read and those that follow it in the cache.

    As many as fit beside one shard of another split, which a validation reads: there should be room for two windows of
    `data.shuffle_window` shards, the one that is read and the next. It never fails: a shard that it could not fetch is
    fetched by whoever reads it.

    Args:
        rows: the training shards, as the order numbers them.
        position: in the order, from which on samples are read.
        end: in the order, before which reading ends.
    """

    def __init__(self, cache: ShardCache, rows: Sequence[ShardRow], order: SampleOrder, position: int, end: int):
        self._cache, self._rows, self._order = cache, rows, order
        self._position, self._end = position, end
        self._filled = sum(row.samples > 0 for row in rows)
        self._is_told = False
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
        if self._until <= position < self._end:  # a few batches are read that no step takes
            self._moved.set()

    def _look(self) -> None:
        """Find out what is needed next: all shards of this window, then of the following ones while there is room."""
        (_, current), (self._until, _) = islice(self._order.windows(self._position), 2)
        following = takewhile(lambda window: window[0] < self._end, self._order.windows(self._until))
        plan = dict.fromkeys(current, 0)
        size = sum(self._rows[shard].bytes for shard in plan)
        self._tell(len(plan), size)
        for ahead, shard in ((ahead, shard) for ahead, (_, shards) in enumerate(following, 1) for shard in shards):
            if len(plan) == self._filled:
                break
            if shard in plan:
                continue
            size += self._rows[shard].bytes
            if size > self._cache.limit - self._cache.largest:
                break
            plan[shard] = ahead
        self._plan = [self._rows[shard] for shard in plan]
        self._cache.needed = {self._rows[shard].name: ahead for shard, ahead in plan.items()}

    def _tell(self, shards: int, size: int) -> None:
        """Say once that a window does not fit."""
        if size > self._cache.limit and not self._is_told:
            self._is_told = True
            log.warning(
                "%s is %d, but the %d shards that samples are mixed across at a time have %d bytes: they are fetched "
                "again and again. Set it higher.",
                *(CACHE_BYTES, self._cache.limit, shards, size),
            )

    def _work(self) -> None:
        while not self._ending:
            self._moved.clear()
            self._look()
            self._moved.wait(self._fetch())

    def _fetch(self) -> float:
        """Fetch what is missing, as far as there is room and nobody else does; returns seconds until the next look."""
        pause = LONG_PAUSE_SECONDS
        for row in self._plan:
            if self._ending or self._moved.is_set():
                break  # the plan is of yesterday
            if self._cache.is_here(row):
                continue
            try:
                self._cache.bring(row, wait=0, spared=self._cache.needed)
            except BusyError:
                pause = PAUSE_SECONDS
            except NoRoomError:
                return LONG_PAUSE_SECONDS
            except (CodecmillError, OSError) as error:  # of this disk, where it is full for a moment, say
                log.warning("A shard could not be fetched ahead: %s", error)
                return LONG_PAUSE_SECONDS
        return pause
