"""The order of the training samples: a pure function of seed, epoch and position, never of ranks or workers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipelines.data.randomness import key_digest
from pipelines.errors import CodecmillError

ROUNDS = 8
"""Of the Feistel network; its domains may be tiny, where few rounds mix badly."""


@dataclass(frozen=True)
class Location:
    """Where a sample is: the epoch, the shard's number in its split, the sample's number in the shard."""

    epoch: int
    shard: int
    index: int


class SampleOrder:
    """Epochs that follow each other without end, each with every sample once.

    In each epoch the shards are permuted and taken in windows of `window` shards; within a window the samples are
    permuted. So a reader touches at most `window` shards at a time, and nothing is kept but one number a shard.
    """

    def __init__(self, counts: Sequence[int], seed: int, window: int):
        self._counts = np.asarray(counts, dtype=np.int64).reshape(-1)
        self._seed, self._window = seed, window
        self.total = int(self._counts.sum())
        if self.total == 0:
            raise CodecmillError("There is no training sample in this shard set: use more or larger images.")
        self._layout = lru_cache(maxsize=4)(self._lay_out)

    def locate(self, position: int) -> Location:
        """Where the sample at a position (from 0, through all epochs) is."""
        epochs, shards, indices = self.locate_many(np.array([position]))
        return Location(int(epochs[0]), int(shards[0]), int(indices[0]))

    def locate_many(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`locate` for positions (N,): epochs, shards and indices, each (N,) int64."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, within = np.divmod(positions, self.total)
        shards, indices = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            order, starts = self._layout(int(epoch))
            here = epochs == epoch
            windows = (np.searchsorted(starts, within, side="right") - 1) // self._window
            for number in np.unique(windows[here]):
                chosen = here & (windows == number)
                first, last = number * self._window, min((number + 1) * self._window, len(order))
                bounds = starts[first : last + 1] - starts[first]
                mixed = permute(within[chosen] - starts[first], int(bounds[-1]), self._seed, int(epoch), int(number))
                places = np.searchsorted(bounds, mixed, side="right") - 1
                shards[chosen], indices[chosen] = order[first + places], mixed - bounds[places]
        return epochs, shards, indices

    def windows(self, position: int) -> Iterator[tuple[int, list[int]]]:
        """The windows that are read from a position on, without end: where each begins, and its shards' numbers."""
        epoch, within = divmod(position, self.total)
        order, starts = self._layout(epoch)
        number = (int(np.searchsorted(starts, within, side="right")) - 1) // self._window
        while True:
            for first in range(number * self._window, len(order), self._window):
                yield epoch * self.total + int(starts[first]), order[first : first + self._window].tolist()
            epoch, number = epoch + 1, 0
            order, starts = self._layout(epoch)

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, without empty ones, and where each begins, the total at the end."""
        filled = np.flatnonzero(self._counts)
        order = filled[permute(np.arange(len(filled)), len(filled), self._seed, epoch, "shards")]
        return order, np.concatenate([[0], np.cumsum(self._counts[order])])


def permute(values: np.ndarray, size: int, *key: int | str) -> np.ndarray:
    """A keyed permutation of 0 ... size - 1, applied to `values` (N,) int64.

    A Feistel network over the smallest even number of bits that holds `size`, walked on until the result lies inside
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): no table, however large the domain.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.frombuffer(key_digest(*key, number)[:8], "<u8")[0] for number in range(ROUNDS)]
    result = values.astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        left, right = result[walking] >> half, result[walking] & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        result[walking] = (left << half) | right
        walking = walking[result[walking] >= size]
    return result.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
