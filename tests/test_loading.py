"""Batches: the same whatever the threads, complete whatever the ranks, and errors that arrive."""

import os
import threading
import time
from collections import Counter
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make, picture
from PIL import Image
from processes import wait_for

from pipelines.config import RunConfig
from pipelines.data.batch_making import Batch
from pipelines.data.decoded_patches import DecodedPatches
from pipelines.data.images import decode_png, to_tensor
from pipelines.data.loading import blank_batch, training_batches, validation_batches
from pipelines.data.order import SampleOrder
from pipelines.data.randomness import random_generator
from pipelines.data.shard_format import Split
from pipelines.data.shard_set import RawSample, Sample, ShardSet
from pipelines.data.shards import create_shards
from pipelines.data.transforms import draw
from pipelines.errors import CodecmillError
from pipelines.processor_cores import usable_cores

ALL_CORES = max(2, usable_cores())
WAYS = {"beside steps": 1, "between steps": ALL_CORES}
"""A step with one thread has batches decoded beside it, one that takes all cores has them decoded between two steps."""


@pytest.fixture(scope="module", params=WAYS.values(), ids=list(WAYS))
def made(
    request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ShardSet, RunConfig]:
    """A shard set of which every image has a mask: its own red channel."""
    folder = tmp_path_factory.mktemp("loading")
    (folder / "masks").mkdir()
    for photo in sorted(photos.iterdir()):
        Image.open(photo).getchannel("R").save(folder / "masks" / photo.name)
    data = {"images": str(photos), "masks": str(folder / "masks"), "patch_size": 32, "workers": 1}
    training = {"batch_size": 6, "crop_size": 16, "threads": request.param, "device": "cpu"}
    config = RunConfig.model_validate({"root": folder / "root", "data": data, "training": training})
    return create_shards(config), config


def varied(config: RunConfig, **data: Any) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def taken(made: tuple[ShardSet, RunConfig], steps: int, first: int = 1, rank: int = 0, of: int = 1) -> list[Batch]:
    with training_batches(*made, first, rank, of) as batches:
        return list(islice(batches, steps))


def loading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loading")]


def equal(a: Batch, b: Batch) -> bool:
    assert a.masks is not None
    assert b.masks is not None
    return (a.keys, a.positions, a.step) == (b.keys, b.positions, b.step) and (
        torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks)
    )


def test_the_noise_of_a_sample_is_the_same_on_any_rank(made: tuple[ShardSet, RunConfig]):
    """Keyed by seed, step and position, and by nothing else: resuming draws it again."""
    config = varied(made[1], workers=3)
    for rank, of in ((0, 1), (1, 3)):
        with training_batches(made[0], config, 4, rank, of, noise_shape=(5, 2)) as batches:
            for step, batch in zip((4, 5), batches, strict=False):
                assert batch.noise is not None
                keys = [(config.seed, step, position, "noise") for position in batch.positions]
                drawn = [random_generator(*key).random((5, 2), np.float32) for key in keys]
                assert torch.equal(batch.noise, torch.from_numpy(np.stack(drawn)) - 0.5)


def test_a_rank_has_as_many_samples_in_every_step(made: tuple[ShardSet, RunConfig]):
    """Also where the ranks do not divide the batch of six."""
    shares = [taken(made, 5, rank=rank, of=4) for rank in range(4)]
    assert [{len(batch.positions) for batch in share} for share in shares] == [{2}, {2}, {1}, {1}]
    seen = sorted(position for share in shares for batch in share for position in batch.positions)
    assert seen == list(range(30))


def test_threads_change_nothing(made: tuple[ShardSet, RunConfig]):
    shard_set, config = made
    one = taken((shard_set, varied(config, workers=1)), 30)
    many = taken((shard_set, varied(config, workers=7)), 30)
    assert all(equal(a, b) for a, b in zip(one, many, strict=True))
    assert one[0].images.shape == (6, 3, 16, 16)
    assert one[0].masks is not None
    assert one[0].masks.shape == (6, 1, 16, 16)
    assert one[0].images.dtype == one[0].masks.dtype == torch.uint8
    assert all(batch.wait >= 0 for batch in one)


def test_from_any_step_the_batches_are_those_of_that_step(made: tuple[ShardSet, RunConfig]):
    """Also beyond the positions that are looked up at once."""
    whole, later = taken(made, 95), taken(made, 75, first=21)
    assert all(equal(a, b) for a, b in zip(whole[20:], later, strict=True))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_ranks_together_read_the_global_batch(made: tuple[ShardSet, RunConfig], ranks: int):
    whole = taken(made, 4)
    shares = [taken(made, 4, rank=rank, of=ranks) for rank in range(ranks)]
    for step, batch in enumerate(whole):
        for position, key, image in zip(batch.positions, batch.keys, batch.images, strict=True):
            share = shares[position % 6 % ranks][step]
            place = share.positions.index(position)
            assert share.keys[place] == key
            assert torch.equal(share.images[place], image)
        assert sorted(i for share in shares for i in share[step].positions) == batch.positions
        assert batch.positions == list(range(6 * step, 6 * step + 6))


def test_every_epoch_reads_every_sample_once(made: tuple[ShardSet, RunConfig]):
    shard_set, _ = made
    total = sum(shard_set.counts("train"))
    stored = sorted(sample.key for sample in shard_set.samples("train"))
    keys = [key for batch in taken(made, -(-3 * total // 6)) for key in batch.keys]
    for epoch in range(3):
        assert sorted(keys[epoch * total : (epoch + 1) * total]) == stored
    assert keys[:total] != keys[total : 2 * total]


def test_masks_go_the_way_of_their_images(made: tuple[ShardSet, RunConfig]):
    shard_set, config = made
    for batch in taken((shard_set, varied(config, flip_vertical=True)), 20):
        assert batch.masks is not None
        assert torch.equal(batch.masks, batch.images[:, :1]), "the mask is the red channel"
    for batch in taken((shard_set, varied(config, min_scale=0.5, max_scale=2.0)), 20):
        assert batch.masks is not None
        difference = (batch.masks.int() - batch.images[:, :1].int()).abs().float().mean()
        assert difference < 12, "grain and gradients of a few levels, where nearest and bicubic differ"


def test_crops_are_pieces_of_the_stored_patch(made: tuple[ShardSet, RunConfig]):
    shard_set, config = made
    order = SampleOrder(shard_set.counts("train"), config.seed, config.data.shuffle_window)
    batch = taken((shard_set, varied(config, flip_horizontal=False)), 1)[0]
    for position, key, crop in zip(batch.positions, batch.keys, batch.images.numpy(), strict=True):
        place = order.locate(position)
        sample = shard_set.read("train", place.shard, place.index)
        assert sample.key == key
        patch = np.asarray(decode_png(sample.image)).transpose(2, 0, 1)
        assert any(np.array_equal(patch[:, y : y + 16, x : x + 16], crop) for y in range(17) for x in range(17)), (
            "a crop is cut, not resampled"
        )


def test_batches_are_what_pillow_and_torchvision_make_of_the_patches(made: tuple[ShardSet, RunConfig]):
    """Bit for bit, through an epoch's end, from the random numbers of seed, epoch and key."""
    shard_set, config = made
    order = SampleOrder(shard_set.counts("train"), config.seed, config.data.shuffle_window)
    last = sum(shard_set.counts("train")) // 6
    for choices in ({}, {"min_scale": 0.5, "max_scale": 2.0}):
        varying = varied(config, flip_vertical=True, **choices)
        for batch in taken((shard_set, varying), 3, first=last):
            assert batch.masks is not None
            for position, image, mask in zip(batch.positions, batch.images, batch.masks, strict=True):
                place = order.locate(position)
                sample = shard_set.read("train", place.shard, place.index)
                assert sample.mask is not None
                drawn = draw(varying.data, 16, (32, 32), config.seed, place.epoch, sample.key)
                assert torch.equal(image, to_tensor(drawn.apply(decode_png(sample.image))))
                assert torch.equal(mask, to_tensor(drawn.apply_to_mask(decode_png(sample.mask))))


def test_the_batch_that_warms_a_step_up_lies_in_memory_like_the_others(made: tuple[ShardSet, RunConfig]):
    """Else a compiled step would be compiled twice."""
    blank = blank_batch(made[1], 4, 1, noise_shape=(7,))
    with training_batches(*made, 1, 1, 4, noise_shape=(7,)) as batches:
        batch = next(batches)
    assert blank.positions == batch.positions
    for one, other in ((blank.images, batch.images), (blank.masks, batch.masks), (blank.noise, batch.noise)):
        assert one is not None
        assert other is not None
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_an_image_without_a_mask_counts_as_outside(tmp_path: Path, tiny: dict[str, Any]):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(5):
        picture(number, 40, 40).save(tmp_path / "images" / f"{number}.png")
    Image.new("L", (40, 40), 255).save(tmp_path / "masks" / "3.png")
    choices = {"images": str(tmp_path / "images"), "masks": str(tmp_path / "masks"), "patch_size": 16}
    config = make(tiny, data=choices | {"validation_fraction": 0, "test_fraction": 0})
    values = set()
    for batch in taken((create_shards(config), config), 10):
        assert batch.masks is not None
        values |= set(batch.masks.unique().tolist())
    assert values == {0, 255}


def test_without_masks_in_the_config_batches_have_none(made: tuple[ShardSet, RunConfig]):
    shard_set, config = made
    assert taken((shard_set, varied(config, masks=None)), 1)[0].masks is None


@pytest.mark.parametrize("ranks", [1, 3])
def test_validation_shows_the_middle_of_every_patch_in_stored_order(made: tuple[ShardSet, RunConfig], ranks: int):
    shard_set, config = made
    expected = [
        (sample.key, np.asarray(decode_png(sample.image)).transpose(2, 0, 1)[:, 8:24, 8:24])
        for sample in shard_set.samples("validation")
    ]
    seen = {}
    for rank in range(ranks):
        for batch in validation_batches(shard_set, config, rank, ranks):
            assert len(batch.images) <= 6 // ranks
            seen |= dict(zip(batch.positions, zip(batch.keys, batch.images.numpy(), strict=True), strict=True))
    assert sorted(seen) == list(range(len(expected)))
    for position, (key, image) in enumerate(expected):
        assert seen[position][0] == key
        assert np.array_equal(seen[position][1], image)
    assert not loading_threads()


def test_no_thread_stays_behind(made: tuple[ShardSet, RunConfig]):
    with training_batches(*made, 1, 0, 1) as batches:
        next(batches)
        assert loading_threads()
    assert not loading_threads()
    with pytest.raises(ZeroDivisionError), training_batches(*made, 1, 0, 1) as batches:
        next(batches)
        raise ZeroDivisionError
    assert not loading_threads()
    with training_batches(*made, 1, 0, 1):
        pass
    assert not loading_threads()
    for _ in validation_batches(*made, 0, 1):
        break
    assert not loading_threads()


class Counted(ShardSet):
    """Counts the samples whose bytes were read ahead, and those that were decoded."""

    def __init__(self, of: ShardSet):
        super().__init__(of.path, of.manifest)
        self.ahead = self.decoded = 0

    def raw(self, split: Split, shard: int, index: int) -> RawSample | None:
        found = super().raw(split, shard, index)
        self.ahead += 1
        return found

    def read(self, split: Split, shard: int, index: int, raw: RawSample | None = None) -> Sample:
        found = super().read(split, shard, index, raw)
        self.decoded += 1
        return found


def test_a_few_batches_are_read_ahead_and_decoded_only_where_a_step_leaves_cores(made: tuple[ShardSet, RunConfig]):
    shard_set, config = made
    counted = Counted(shard_set)
    with training_batches(counted, config, 1, 0, 1) as batches:
        batch = next(batches)
        wait_for(lambda: max(counted.ahead, counted.decoded) >= 6 * 4)
        time.sleep(0.1)  # in which no more are
    if config.training.threads == 1:
        assert (counted.decoded, counted.ahead, batch.decoding) == (6 * 4, 0, 0)
    else:
        assert (counted.decoded, counted.ahead) == (6, 6 * 4)
        assert batch.decoding > 0


def test_what_was_read_ahead_needs_no_disk(tmp_path: Path, photos: Path, tiny: dict[str, Any]):
    """Decoding between two steps does not wait for one: it would keep the whole step waiting."""
    config = make(tiny, training={"threads": ALL_CORES, "device": "cpu"})
    shard_set = create_shards(config)
    whole = taken((shard_set, config), 4)
    counted = Counted(shard_set)
    with training_batches(counted, config, 1, 0, 1) as batches:
        first = next(batches)
        wait_for(lambda: counted.ahead == 4 * 4)
        for row in shard_set.rows("train"):
            os.truncate(shard_set.path / row.tar, 0)
        then = [first, *islice(batches, 3)]
        with pytest.raises(CodecmillError, match=r"Sample \d+ of .*tar is damaged"):
            next(batches)
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole, then, strict=True))


def test_a_store_that_stalls_holds_back_no_batch_that_is_in_memory(tmp_path: Path, photos: Path, tiny: dict[str, Any]):
    config = make(tiny, training={"threads": ALL_CORES, "device": "cpu"})
    shard_set = create_shards(config)
    has_come_back = threading.Event()
    asked = count()

    class Stalling(ShardSet):
        def raw(self, split: Split, shard: int, index: int) -> RawSample | None:
            if next(asked) >= 2 * 4 and not has_come_back.wait(30):  # from the third batch on
                has_come_back.set()
            return super().raw(split, shard, index)

    with training_batches(Stalling(shard_set.path, shard_set.manifest), config, 1, 0, 1) as batches:
        ready = list(islice(batches, 2))
        assert not has_come_back.is_set()
        has_come_back.set()
        ready += islice(batches, 2)
    whole = taken((shard_set, config), 4)
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole, ready, strict=True))


@pytest.mark.parametrize("threads", WAYS.values(), ids=list(WAYS))
def test_a_damaged_sample_reaches_the_caller_at_its_batch(
    tmp_path: Path, photos: Path, tiny: dict[str, Any], threads: int
):
    config = make(tiny, training={"threads": threads, "device": "cpu"})
    shard_set = create_shards(config)
    order = SampleOrder(shard_set.counts("train"), config.seed, config.data.shuffle_window)
    place = order.locate(9)  # of the third batch of four
    key = shard_set.read("train", place.shard, place.index).key
    tar = shard_set.path / shard_set.rows("train")[place.shard].tar
    content = bytearray(tar.read_bytes())
    content[content.index(f"{key}.png".encode()) + 600] ^= 1
    tar.write_bytes(content)
    with training_batches(ShardSet.open(shard_set.path), config, 1, 0, 1) as batches:
        for _ in range(2):
            next(batches)
        with pytest.raises(CodecmillError, match=rf"Sample {place.index} of .*{tar.name} is damaged"):
            next(batches)
    assert not loading_threads()


def test_patches_kept_in_memory_are_decoded_once_and_change_nothing(made: tuple[ShardSet, RunConfig]):
    shard_set, config = made
    count = sum(shard_set.counts("train"))
    steps = 3 * -(-count // config.training.batch_size)
    reads: list[tuple[int, int]] = []

    class Counting(ShardSet):
        def read(self, split: Split, shard: int, index: int, raw: RawSample | None = None) -> Sample:
            reads.append((shard, index))
            return super().read(split, shard, index, raw)

    plain = taken(made, steps)
    for kept in (5, count):
        reads.clear()
        counting = Counting(shard_set.path, shard_set.manifest)
        cached = taken((counting, varied(config, decoded_cache=kept)), steps)
        assert all(equal(a, b) for a, b in zip(plain, cached, strict=True))
        often = Counter(Counter(reads).values())
        # Each patch is drawn three times, those of the steps that are made ahead once more at most.
        assert often[1] == kept
        assert all(times in (1, 3, 4) for times in often)
    patches = DecodedPatches(shard_set, "train", with_masks=False, kept=1)
    once, again, other = (patches.read(0, index).image.part(0, 0, 32, 32) for index in (0, 0, 1))
    assert np.shares_memory(once, again)
    assert not np.shares_memory(once, other)
