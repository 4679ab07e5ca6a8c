"""The sample order of a large set walked by many ranks, without pixels: who reads what, and what a cache saves."""

import itertools
import random
import tracemalloc
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipelines.data.order import SampleOrder

SEED = 0


@dataclass(frozen=True)
class Cluster:
    """Ranks on hosts, and the shards that all of them read.

    Attributes:
        samples: of each shard; a few have many more than others, as sizes of photographs do.
        window: shards that samples are mixed across, `data.shuffle_window`.
    """

    hosts: int
    ranks_a_host: int
    samples: tuple[int, ...]
    window: int

    @property
    def ranks(self) -> int:
        return self.hosts * self.ranks_a_host

    @property
    def order(self) -> SampleOrder:
        return SampleOrder(self.samples, SEED, self.window)


def cluster(shards: int, mean: int, hosts: int, ranks_a_host: int, window: int) -> Cluster:
    """One whose shards have `mean` samples, give or take a third, as halving ranges of hashes leaves them."""
    chance = random.Random(SEED)  # noqa: S311  # no secret
    samples = tuple(int(mean * chance.uniform(2 / 3, 4 / 3)) for _ in range(shards))
    return Cluster(hosts, ranks_a_host, samples, window)


@dataclass(frozen=True)
class Balance:
    """Of some windows, the worst: samples that one rank reads more than another, and the share of the shards that a
    host touches."""

    apart: int
    least_touched: float


def balance(of: Cluster, windows: int) -> Balance:
    """Walk the first windows position by position, as the ranks do: a rank takes every `ranks`-th."""
    order = of.order
    begins = [begin for begin, _ in itertools.islice(order.windows(0), windows + 1)]
    apart: list[int] = []
    touched: list[float] = []
    for begin, end in itertools.pairwise(begins):
        positions = np.arange(begin, end)
        _, shards, _ = order.locate_many(positions)
        ranks = positions % of.ranks
        apart.append(int(np.ptp(np.bincount(ranks, minlength=of.ranks))))
        inside = len(np.unique(shards))
        for host in range(of.hosts):
            here = np.unique(shards[ranks // of.ranks_a_host == host])
            touched.append(len(here) / inside)
    return Balance(max(apart), min(touched))


def fetched(of: Cluster, room: int, epochs: int) -> list[float]:
    """Shards that a host fetches in each epoch, over those that there are, with a cache of `room` shards.

    What was used least recently makes room, as in `pipelines.data.shard_cache`.
    """
    windows = itertools.takewhile(lambda each: each[0] < epochs * of.order.total, of.order.windows(0))
    cache: OrderedDict[int, None] = OrderedDict()
    misses = [0] * epochs
    for begin, shards in windows:
        misses[begin // of.order.total] += _missing(cache, shards, room)
    return [count / len(of.samples) for count in misses]


def _missing(cache: "OrderedDict[int, None]", shards: Iterable[int], room: int) -> int:
    missing = 0
    for shard in shards:
        if shard in cache:
            cache.move_to_end(shard)
            continue
        missing += 1
        cache[shard] = None
        if len(cache) > room:
            cache.popitem(last=False)
    return missing


def order_bytes(of: Cluster) -> int:
    """Memory that a rank needs for the order, at most: it looks up positions of two windows and of two epochs."""
    tracemalloc.start()
    order = of.order
    order.locate_many(np.array([0, order.total // 2, order.total, 2 * order.total - 1]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak
