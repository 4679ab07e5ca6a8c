"""The order of samples: every epoch a permutation, by any route, in next to no memory."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.order import Location, SampleOrder, permute
from pipelines.errors import CodecmillError

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


@given(counts=COUNTS, seed=st.integers(0, 2**63 - 1), window=st.integers(1, 15), epoch=st.integers(0, 3))
def test_every_epoch_has_every_sample_once(counts: list[int], seed: int, window: int, epoch: int):
    order = SampleOrder(counts, seed, window)
    epochs, shards, indices = order.locate_many(np.arange(order.total) + epoch * order.total)
    assert set(epochs) == {epoch}
    found = Counter(zip(shards.tolist(), indices.tolist(), strict=True))
    assert found == Counter((shard, index) for shard, count in enumerate(counts) for index in range(count))


@given(counts=COUNTS, window=st.integers(1, 15), start=st.integers(0, 10**6))
def test_one_position_is_located_as_among_many(counts: list[int], window: int, start: int):
    positions = np.arange(start, start + 30)
    order = SampleOrder(counts, 7, window)
    together = zip(*(found.tolist() for found in order.locate_many(positions)), strict=True)
    again = SampleOrder(counts, 7, window)
    assert [Location(*place) for place in together] == [again.locate(int(position)) for position in positions[::-1]][
        ::-1
    ]


@given(size=st.integers(1, 3000), key=st.integers(0, 10**9))
def test_permute_is_a_permutation(size: int, key: int):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


def test_a_window_touches_no_more_shards_than_it_may():
    order = SampleOrder([10] * 20, seed=3, window=4)
    _, shards, _ = order.locate_many(np.arange(200))
    windows = [set(shards[i : i + 40].tolist()) for i in range(0, 200, 40)]
    assert [len(window) for window in windows] == [4] * 5
    assert set.union(*windows) == set(range(20))


def test_epochs_seeds_and_windows_differ():
    windows: set[tuple[int, ...]] = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 1)):
        _, _, indices = SampleOrder([50, 50], seed, window=1).locate_many(np.arange(100) + 100 * epoch)
        windows |= {tuple(indices[:50].tolist()), tuple(indices[50:].tolist())}
    assert len(windows) == 6


def test_samples_are_spread_evenly():
    """Over many epochs each sample is as often at each place: chi-square of 12 x 12 with 121 degrees of freedom."""
    size, epochs = 12, 2400
    order = SampleOrder([5, 7], seed=1, window=2)
    _, shards, indices = order.locate_many(np.arange(size * epochs))
    samples = (shards * 5 + indices).reshape(epochs, size)
    counts = np.stack([np.bincount(samples[:, place], minlength=size) for place in range(size)])
    expected = epochs / size
    assert ((counts - expected) ** 2 / expected).sum() < 121 + 5 * (2 * 121) ** 0.5


def test_memory_does_not_grow_with_the_samples():
    tracemalloc.start()
    order = SampleOrder([10**12] * 1000, seed=0, window=64)
    place = order.locate(10**15 - 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert place.epoch == 0
    assert 0 <= place.index < 10**12
    assert peak < 2**20


def test_without_samples_there_is_no_order():
    with pytest.raises(CodecmillError, match="There is no training sample in this shard set"):
        SampleOrder([0, 0], 0, 1)
