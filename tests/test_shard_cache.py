"""Shards that lie in a store: fetched ahead of use, verified, within a bound, and the same samples as from the disk."""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from object_store import BUCKET, Proxy
from processes import wait_for

from pipelines import storage
from pipelines.config import RunConfig
from pipelines.data import block_statistics, read_ahead, remote_sets, shard_cache, suspects
from pipelines.data.block_statistics import block_transform
from pipelines.data.loading import training_batches, validation_batches
from pipelines.data.order import SampleOrder
from pipelines.data.shard_cache import NoRoomError
from pipelines.data.shard_format import MANIFEST, is_whole
from pipelines.data.shard_set import ShardSet
from pipelines.data.shards import create_shards
from pipelines.errors import CodecmillError, InputError
from pipelines.locks import lock
from pipelines.storage import StoreError
from pipelines.storage.keys import of_shard_set
from pipelines.storage.sending import send_shard_set


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShardSet, RunConfig]:
    """A set of a dozen small shards."""
    folder = tmp_path_factory.mktemp("cache")
    for number in range(64):
        picture(number, 256, 192).save(folder / f"photo {number:02d}.png")
    data = {"images": str(folder), "patch_size": 64, "workers": 1, "max_shard_mib": 1, "shuffle_window": 3}
    training = {"batch_size": 8, "crop_size": 32}
    config = RunConfig.model_validate({"root": folder / "root", "data": data, "training": training})
    shard_set = create_shards(config)
    assert len(shard_set.rows("train")) >= 8
    return shard_set, config


Made = tuple[ShardSet, RunConfig]


@pytest.fixture
def elsewhere(made: Made, proxy: Proxy, tmp_path: Path) -> Path:
    """The folder on another machine of a set that lies in a store, where all tests find it."""
    store = storage.open_store(f"s3://{BUCKET}/cache")
    send_shard_set(store, made[0].path)
    folder = tmp_path / "root" / "shards" / made[0].path.name
    key = of_shard_set(folder)
    remote_sets.make_known(folder, store.address(key), store.read(f"{key}/{MANIFEST}"))
    return folder


def tars(folder: Path) -> dict[str, int]:
    """The sizes of the tars that are here; some may be evicted at this very moment."""
    found: dict[str, int] = {}
    for file in folder.glob("*.tar"):
        with suppress(FileNotFoundError):
            found[file.stem] = file.stat().st_size
    return found


def bound(made: Made, shards: float, monkeypatch: pytest.MonkeyPatch) -> int:
    """Have room for so many of the largest shard."""
    limit = int(shards * max(row.bytes for row in made[0].manifest.shards))
    monkeypatch.setenv(shard_cache.CACHE_BYTES, str(limit))
    return limit


def test_batches_are_those_of_the_disk_and_the_bound_holds_at_every_moment(
    made: Made, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
):
    limit = bound(made, 4.0, monkeypatch)
    cached = ShardSet.open(elsewhere)
    steps = 3 * made[0].manifest.samples["train"] // 8
    largest = 0
    with training_batches(*made, 1, 0, 1) as expected, training_batches(cached, made[1], 1, 0, 1) as found:
        for a, b in islice(zip(expected, found, strict=True), steps):
            assert torch.equal(a.images, b.images)
            assert a.keys == b.keys
            largest = max(largest, sum(tars(elsewhere).values()))
    for a, b in zip(validation_batches(*made, 0, 1), validation_batches(cached, made[1], 0, 1), strict=True):
        assert torch.equal(a.images, b.images)
        largest = max(largest, sum(tars(elsewhere).values()))
    assert limit / 2 < largest <= limit
    assert [(row.path, row.sha256) for row in cached.sources("test")] == [
        (row.path, row.sha256) for row in made[0].sources("test")
    ]
    assert cached.verify() != []  # not all of it is here


def test_the_windows_of_the_order_hold_the_shards_that_are_read_in_them(made: Made):
    order = SampleOrder(made[0].counts("train"), 3, 3)
    for position in (0, 5, order.total - 1, order.total, 2 * order.total + 17):
        windows = order.windows(position)
        begin, current = next(windows)
        for following, shards in islice(windows, 12):
            assert begin <= position < following or position < begin < following
            _, read, _ = order.locate_many(np.arange(begin, following))
            assert set(read.tolist()) == set(current)
            begin, current = following, shards


def test_what_comes_next_is_fetched_before_it_is_read(made: Made, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    bound(made, 7.5, monkeypatch)
    cached = ShardSet.open(elsewhere)
    order = SampleOrder(cached.counts("train"), made[1].seed, 3)
    windows = order.windows(0)
    (_, first), (second_begin, second), (third_begin, third) = islice(windows, 3)
    with cached.read_ahead(order, 0, 10 * order.total) as ahead:
        assert ahead is not None
        wait_for(lambda: {cached.rows("train")[each].name for each in first + second} <= set(tars(elsewhere)), 20)
        ahead.reached(second_begin)
        wait_for(lambda: {cached.rows("train")[each].name for each in second + third} <= set(tars(elsewhere)), 20)
        ahead.reached(third_begin)


def test_a_disk_that_fails_for_a_moment_does_not_end_the_fetching_ahead(
    made: Made, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As a full one does, which has no room for a lock either."""
    monkeypatch.setattr(read_ahead, "LONG_PAUSE_SECONDS", 0.05)
    cached = ShardSet.open(elsewhere)
    order = SampleOrder(cached.counts("train"), made[1].seed, 3)
    _, first = next(order.windows(0))
    names = [cached.rows("train")[each].name for each in first]
    (in_the_way := elsewhere / f".tmp-{names[0]}.tar.lock").mkdir()
    with cached.read_ahead(order, 0, order.total):
        wait_for(lambda: "A shard could not be fetched ahead: [Errno 21] Is a directory" in caplog.text, 20)
        in_the_way.rmdir()
        wait_for(lambda: set(names) <= set(tars(elsewhere)), 20)


def test_nothing_is_fetched_ahead_that_no_step_reads(made: Made, elsewhere: Path):
    cached, cache = ShardSet.open(elsewhere), ShardSet.open(elsewhere)._cache
    order = SampleOrder(cached.counts("train"), made[1].seed, 3)
    (_, first), (begin, _), (next_but_one, _) = islice(order.windows(0), 3)
    names = {cached.rows("train")[each].name for each in first}
    training = made[1].training.model_copy(update={"steps": begin // made[1].training.batch_size})
    with training_batches(cached, made[1].model_copy(update={"training": training}), 1, 0, 1):
        assert cached._cache is not None and set(cached._cache.needed) == names
    assert cache is not None
    with read_ahead.ReadAhead(cache, cached.rows("train"), order, 0, begin) as ahead:
        ahead.reached(next_but_one)
        assert not ahead._moved.is_set()
        wait_for(lambda: names <= set(tars(elsewhere)), 20)
    assert set(cache.needed) == set(tars(elsewhere)) == names


def test_a_validation_evicts_nothing_that_is_needed_next(made: Made, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(read_ahead, "LONG_PAUSE_SECONDS", 0.1)
    bound(made, 6.0, monkeypatch)
    cached = ShardSet.open(elsewhere)
    order = SampleOrder(cached.counts("train"), made[1].seed, 3)
    _, first = next(order.windows(0))
    with cached.read_ahead(order, 0, order.total):
        assert cached._cache is not None
        needed = set(cached._cache.needed)
        assert len(needed) > len(first)
        wait_for(lambda: needed <= set(tars(elsewhere)), 20)
        for _ in validation_batches(cached, made[1], 0, 1):
            assert needed <= set(tars(elsewhere))
        (elsewhere / f"{min(needed)}.tar").unlink()  # as another process may, which needs others
        wait_for(lambda: needed <= set(tars(elsewhere)), 20)


def test_a_window_that_does_not_fit_is_told_of_once_and_no_more_of_it_is_asked_for(
    made: Made, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    limit = bound(made, 1.0, monkeypatch)
    cached = ShardSet.open(elsewhere)
    order = SampleOrder(cached.counts("train"), made[1].seed, 3)
    _, first = next(order.windows(0))
    assert cached._cache is not None
    ahead = read_ahead.ReadAhead(cached._cache, cached.rows("train"), order, 0, order.total)
    for _ in range(2):
        ahead._look()
        assert ahead._fetch() == read_ahead.LONG_PAUSE_SECONDS
    assert set(tars(elsewhere)) == {cached.rows("train")[first[0]].name}
    assert len(list(elsewhere.glob(".tmp-*.tar.lock"))) == 2, "the third was not asked for when the second had no room"
    (said,) = caplog.messages
    assert f"CODECMILL_CACHE_BYTES is {limit}, but the 3 shards that samples are mixed across at a time have" in said


def test_a_codec_looks_at_patches_of_a_few_shards_alone(made: Made, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    """Of many small ones at more: no fewer patches are looked at."""
    few, counts = block_statistics.FEW_SHARDS, made[0].counts("train")
    assert few < len(counts)
    for most, shards in ((64, few), (sum(counts) * (few + 1) // len(counts), few + 1)):
        monkeypatch.setattr(block_statistics, "MOST_PATCHES", most)
        cached = ShardSet.open(elsewhere)
        block_transform(cached, 4, 8)
        assert len(tars(elsewhere)) == shards
        for name in tars(elsewhere):
            (elsewhere / f"{name}.tar").unlink()


def test_of_what_is_needed_the_latest_is_evicted_first(made: Made, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    bound(made, 3.0, monkeypatch)
    cache = ShardSet.open(elsewhere)._cache
    assert cache is not None
    rows = sorted(made[0].rows("train"), key=lambda row: -row.bytes)
    cache.needed = {row.name: ahead for ahead, row in enumerate(rows[:3])}
    for row in rows[:4]:
        cache.bring(row)
    assert set(tars(elsewhere)) == {rows[0].name, rows[1].name, rows[3].name}
    cache.bring(rows[4])
    assert set(tars(elsewhere)) == {rows[0].name, rows[1].name, rows[4].name}


@pytest.mark.parametrize(("used", "idle"), [(1, 2), (2, 1)])
def test_what_is_open_is_not_evicted_and_the_rest_goes_by_its_last_use(
    used: int, idle: int, made: Made, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shard_cache, "JUST_USED_NS", 0)
    bound(made, 3.0, monkeypatch)
    cached, cache = ShardSet.open(elsewhere), ShardSet.open(elsewhere)._cache
    assert cache is not None
    rows = sorted(cached.rows("train"), key=lambda row: -row.bytes)  # of the largest, three fit and no four
    held = cache.hold(rows[0])
    for row in rows[1:3]:
        cache.bring(row)
    cached.read("train", cached.rows("train").index(rows[used]), 0)
    cache.bring(rows[3])
    assert {rows[0].name, rows[used].name, rows[3].name} <= set(tars(elsewhere))
    assert rows[idle].name not in tars(elsewhere)
    os.close(held)
    for row in rows[4:7]:
        cache.bring(row)
    assert rows[0].name not in tars(elsewhere)


@pytest.mark.usefixtures("nfs_locks")
def test_a_shard_that_nobody_has_open_is_evicted_also_on_nfs(tmp_path: Path):
    (file := tmp_path / "train-000000.tar").write_bytes(b"shard")
    with file.open("rb") as reader:
        fcntl.flock(reader.fileno(), fcntl.LOCK_SH)
        assert not shard_cache._evicted(file)
    assert shard_cache._evicted(file)
    assert not file.exists()


def test_a_bound_below_what_is_needed_at_once_is_named(made: Made, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(shard_cache.CACHE_BYTES, "1000")
    with pytest.raises(InputError, match=r"CODECMILL_CACHE_BYTES is 1000, but a shard of .* has \d+ bytes. Set it"):
        ShardSet.open(elsewhere)
    monkeypatch.setenv(shard_cache.CACHE_BYTES, "lots")
    with pytest.raises(InputError, match="CODECMILL_CACHE_BYTES is 'lots', which is no number of bytes such as"):
        ShardSet.open(elsewhere)


def test_half_a_shard_and_a_changed_byte_are_fetched_again_and_never_read(made: Made, elsewhere: Path, proxy: Proxy):
    proxy.break_("half", "GET", f"{made[0].rows('train')[0].name}.tar", times=1)
    proxy.break_("flip", "GET", f"{made[0].rows('train')[1].name}.tar", times=1)
    cached = ShardSet.open(elsewhere)
    for shard in (0, 1):
        assert cached.read("train", shard, 3) == made[0].read("train", shard, 3)
        row = cached.rows("train")[shard]
        assert (elsewhere / row.tar).read_bytes() == (made[0].path / row.tar).read_bytes()
    assert [fault.met for fault in proxy.faults] == [1, 1]
    assert not [each for each in elsewhere.glob(".tmp-*") if each.suffix != ".lock"]


def test_a_shard_that_is_damaged_here_is_fetched_anew(made: Made, elsewhere: Path):
    cached = ShardSet.open(elsewhere)
    row = cached.rows("train")[0]
    cached.read("train", 0, 0)
    with (elsewhere / row.tar).open("r+b") as tar:
        tar.seek(2000)
        tar.write(b"\0\1\2\3" * 20)
    assert cached.read("train", 0, 0) == made[0].read("train", 0, 0)
    assert suspects.marked(elsewhere) == []
    with (elsewhere / row.tar).open("r+b") as tar:
        tar.truncate(3000)
    assert ShardSet.open(elsewhere).read("train", 0, 5) == made[0].read("train", 0, 5)


def test_samples_read_ahead_of_a_damaged_shard_have_it_fetched_anew_once(made: Made, elsewhere: Path, proxy: Proxy):
    cached = ShardSet.open(elsewhere)
    row = cached.rows("train")[0]
    cached.read("train", 0, 0)
    (elsewhere / row.tar).write_bytes(bytes(row.bytes))
    ahead = [cached.raw("train", 0, index) for index in range(5)]
    proxy.requests.clear()
    for index, raw in enumerate(ahead):
        assert cached.read("train", 0, index, raw) == made[0].read("train", 0, index)
    assert proxy.count("GET", row.tar) == 1


def test_a_store_that_is_away_is_waited_for_and_then_named(
    made: Made,
    elsewhere: Path,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(shard_cache, "PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr(read_ahead, "PAUSE_SECONDS", 0.1)
    proxy.break_("503", "GET", ".tar")
    cached = ShardSet.open(elsewhere)
    with pytest.raises(
        StoreError, match=r"train-\w+.tar could not be fetched, \d times in \d s: Service Unavailable. L"
    ):
        cached.read("train", 0, 0)
    proxy.faults.clear()
    proxy.break_("503", "GET", ".tar", times=3)
    monkeypatch.setattr(shard_cache, "PATIENCE_SECONDS", 10.0)
    assert cached.read("train", 0, 0) == made[0].read("train", 0, 0)


def test_a_set_that_is_made_here_after_all_is_all_here(made: Made, elsewhere: Path):
    config = made[1].model_copy(update={"root": elsewhere.parent.parent})
    assert create_shards(config).path == elsewhere
    assert remote_sets.origin(elsewhere) is not None  # what lies in a store need not be made


def test_a_shard_that_is_evicted_while_it_is_looked_at_is_not_here(tmp_path: Path):
    file, over = tmp_path / "train-000000.tar", threading.Event()

    def fetch_and_evict() -> None:
        while not over.is_set():
            file.write_bytes(b"shard")
            file.unlink()

    other = threading.Thread(target=fetch_and_evict)
    other.start()
    try:
        seen = {is_whole(file, 5) for _ in range(100_000)}  # one look in 20,000 met the eviction
    finally:
        over.set()
        other.join()
    assert seen == {True, False}
    assert not is_whole(tmp_path, tmp_path.stat().st_size), "a folder is no file"


def test_what_a_killed_fetch_has_left_takes_no_room(made: Made, elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    bound(made, 1.0, monkeypatch)
    cached = ShardSet.open(elsewhere)
    cache = cached._cache
    assert cache is not None
    killed, wanted, *_ = cached.rows("train")
    left = [elsewhere / f".tmp-{killed.tar}-claim", elsewhere / f".tmp-{killed.tar}-4194304-1"]
    for file in left:
        file.write_bytes(b"half")
    with (
        lock(elsewhere / f".tmp-{killed.tar}.lock", "a fetch that is alive", wait=0),
        pytest.raises(NoRoomError, match=rf"{killed.bytes} bytes of it are in use"),
    ):
        cache.bring(wanted)
    cache.bring(wanted)
    assert set(tars(elsewhere)) == {wanted.name}
    assert not any(file.exists() for file in left)


def iterate(batches: Iterator[Any], count: int) -> list[Any]:
    return list(islice(batches, count))


def test_a_local_set_asks_no_store(made: Made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with training_batches(*made, 1, 0, 1) as batches:
        iterate(batches, 3)
    with pytest.raises(CodecmillError, match="is no shard set"):
        ShardSet.open(made[0].path / "nothing")
    assert os.environ["AWS_ENDPOINT_URL"].endswith(":9")
