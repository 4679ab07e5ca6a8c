"""From shards to batches: samples in their order, decoded ahead by threads, the same whatever their number."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.config import RunConfig
from pipelines.data.decoded_patches import DecodedPatches, Patch
from pipelines.data.order import SampleOrder
from pipelines.data.randomness import random_generator
from pipelines.data.read_ahead import ReadAhead
from pipelines.data.shard_set import ShardSet
from pipelines.data.transforms import Draw, draw

AHEAD = 3
"""Batches decoded ahead of the one that is trained on."""

MOST_TOGETHER = 8
"""Samples of a batch that one job makes: starting it costs a twentieth of what it takes to make a sample."""

LOOKED_UP = 512
"""Positions of the order that are looked up at once, in whole steps, to be shared by the ranks."""

_Place = tuple[int, int, int]
"""Epoch, shard and index of a sample."""


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch.

    Attributes:
        images: uint8 (n, 3, S, S), in memory as torch.channels_last.
        masks: uint8 (n, 1, S, S), zeros for an image without one; None where the run has no masks.
        noise: that the model takes, float32 (n, ...) uniform on [-0.5, 0.5), keyed by seed, step and sample: the same
            on any rank. None where it takes none, and in validation.
        keys: the samples' keys.
        positions: their positions in the endless order; in validation, in the split.
        step: the optimiser step that it is for, from 1; 0 in validation.
        wait: seconds that the caller waited for it.
    """

    images: Tensor
    masks: Tensor | None
    noise: Tensor | None
    keys: list[str]
    positions: list[int]
    step: int
    wait: float


class _Request(NamedTuple):
    """A batch to be made: what each of its samples is made of lies at its place in `places`."""

    step: int
    positions: list[int]
    places: list[_Place]


class _Crop(NamedTuple):
    """A stored patch and what is done to it."""

    patch: Patch
    drawn: Draw


@contextmanager
def training_batches(
    shard_set: ShardSet,
    config: RunConfig,
    first_step: int,
    rank: int,
    world_size: int,
    noise_shape: tuple[int, ...] | None = None,
) -> Iterator[Iterator[Batch]]:
    """The batches of one rank from a step on, without end; the threads end with the context.

    Step s reads the positions (s - 1) * batch_size ... s * batch_size - 1 of the order. Of these a rank takes every
    `world_size`-th, from its own number on: as many in every step, since a compiled step sees one shape only.

    Args:
        noise_shape: of the noise that the model takes for a sample; drawn here, where nothing waits for it.

    Raises:
        CodecmillError: a sample cannot be read; from the iterator, at the batch that holds it.
    """
    order = SampleOrder(shard_set.counts("train"), config.seed, config.data.shuffle_window)
    patches = DecodedPatches(shard_set, "train", config.data.masks is not None, config.data.decoded_cache)

    def crop(place: _Place) -> _Crop:
        epoch, shard, index = place
        patch = patches.read(shard, index)
        size = patch.image.width, patch.image.height
        return _Crop(patch, draw(config.data, config.training.crop_size, size, config.seed, epoch, patch.key))

    size = config.training.batch_size
    requests = _training_requests(order, size, first_step, rank, world_size)
    with (
        shard_set.read_ahead(order, (first_step - 1) * size) as ahead,
        ThreadPoolExecutor(config.data.workers, thread_name_prefix="loading") as pool,
    ):
        batches = _batches(pool, config, _told(requests, ahead), crop, noise_shape)
        try:
            yield batches
        finally:
            batches.close()
            pool.shutdown(wait=True, cancel_futures=True)


def _training_requests(
    order: SampleOrder, size: int, first_step: int, rank: int, world_size: int
) -> Iterator[_Request]:
    """Without end. The places of many steps are looked up at once: numpy's calls cost more than what they do."""
    at_once = -(-LOOKED_UP // size)
    for first in count(first_step, at_once):
        shares = [range((step - 1) * size + rank, step * size, world_size) for step in range(first, first + at_once)]
        found = order.locate_many(np.concatenate(shares))
        places = zip(*(each.tolist() for each in found), strict=True)
        for step, share in enumerate(shares, first):
            yield _Request(step, list(share), list(islice(places, len(share))))


def _told(requests: Iterator[_Request], ahead: ReadAhead | None) -> Iterator[_Request]:
    """The same, while who fetches shards ahead hears of each."""
    for request in requests:
        if ahead:
            ahead.reached(request.positions[0])
        yield request


def validation_batches(
    shard_set: ShardSet, config: RunConfig, rank: int, world_size: int
) -> Generator[Batch, None, None]:
    """The middle of every patch of the validation split, in stored order; a rank takes every `world_size`-th batch.

    With virtual ranks the batches are the same whatever the number of ranks, and so are the model's bits on them. Where
    ranks hold shares of the model, a pass takes all of them: who has a batch less gets a blank one, without positions.
    """
    places = [(0, shard, i) for shard, samples in enumerate(shard_set.counts("validation")) for i in range(samples)]
    size = max(1, config.training.batch_size // (config.training.virtual_ranks or world_size))
    patches = DecodedPatches(shard_set, "validation", config.data.masks is not None)

    def crop(place: _Place) -> _Crop:
        patch = patches.read(*place[1:])
        return _Crop(patch, _centre(patch.image.width, patch.image.height, config.training.crop_size))

    shares = [range(len(places))[i : i + size] for i in range(rank * size, len(places), world_size * size)]
    requests = (_Request(0, list(share), places[share.start : share.stop]) for share in shares)
    with ThreadPoolExecutor(config.data.workers, thread_name_prefix="loading") as pool:
        try:
            yield from _batches(pool, config, requests, crop)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if config.training.parallel == "fsdp" and len(shares) < -(-len(places) // (world_size * size)):
        yield replace(blank_batch(config, world_size, rank), keys=[], positions=[])


def blank_batch(config: RunConfig, world_size: int, rank: int, noise_shape: tuple[int, ...] | None = None) -> Batch:
    """Black images for a rank's share of a batch, in memory as its batches are: a compiled step depends on that."""
    positions = list(range(rank, config.training.batch_size, world_size))
    images, masks = _room(config, len(positions))
    images[:] = 0
    return Batch(
        images=_as_tensor(images),
        masks=None if masks is None else _as_tensor(masks),
        noise=None if noise_shape is None else torch.zeros(len(positions), *noise_shape),
        keys=[""] * len(positions),
        positions=positions,
        step=0,
        wait=0.0,
    )


def _room(config: RunConfig, samples: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Images (N, S, S, 3), anything, and masks (N, S, S, 1), black, where the run has them: uint8."""
    side = config.training.crop_size
    masks = np.zeros((samples, side, side, 1), np.uint8) if config.data.masks is not None else None
    return np.empty((samples, side, side, 3), np.uint8), masks


def _as_tensor(levels: np.ndarray) -> Tensor:
    """(N, C, S, S), the same memory: the channels stay the fastest dimension, as they are in a picture."""
    return torch.from_numpy(levels).permute(0, 3, 1, 2)


def _centre(width: int, height: int, side: int) -> Draw:
    return Draw((width - side) // 2, (height - side) // 2, side, side)


def _batches(
    pool: ThreadPoolExecutor,
    config: RunConfig,
    requests: Iterator[_Request],
    crop: Callable[[_Place], _Crop],
    noise_shape: tuple[int, ...] | None = None,
) -> Generator[Batch, None, None]:
    """Keep `AHEAD` batches in the making; an error arrives with the batch that it belongs to."""

    def makings(most: int) -> Iterator[_Making]:
        return (_Making(pool, config, request, crop, noise_shape) for request in islice(requests, most))

    underway = deque(makings(AHEAD + 1))
    while underway:
        batch = underway.popleft().result()
        # Afterwards: a thread that wakes up for a new job may take the processor from this one, which is awaited.
        underway.extend(makings(AHEAD - len(underway)))
        yield batch


class _Making:
    """A batch that threads fill, some of its samples each: a job for every single one would cost as much as the rest.

    What they write to is the batch itself; nothing is put together afterwards.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        config: RunConfig,
        request: _Request,
        crop: Callable[[_Place], _Crop],
        noise_shape: tuple[int, ...] | None,
    ):
        samples = len(request.places)
        self._request, self._crop, self._seed = request, crop, config.seed
        self._images, self._masks = _room(config, samples)
        self._noise = None if noise_shape is None else np.empty((samples, *noise_shape), np.float32)
        each = min(MOST_TOGETHER, -(-samples // config.data.workers))
        self._jobs = [pool.submit(self._fill, range(samples)[i : i + each]) for i in range(0, samples, each)]

    def _fill(self, samples: range) -> list[str]:
        """Make some of the samples; returns their keys."""
        keys = []
        for i in samples:
            patch, drawn = self._crop(self._request.places[i])
            drawn.put(patch.image, self._images[i])
            if patch.mask and self._masks is not None:
                drawn.put(patch.mask, self._masks[i])
            if self._noise is not None:
                key = self._request.step, self._request.positions[i], "noise"
                random_generator(self._seed, *key).random(dtype=np.float32, out=self._noise[i])
                self._noise[i] -= 0.5
            keys.append(patch.key)
        return keys

    def result(self) -> Batch:
        started = time.perf_counter()
        keys = [key for job in self._jobs for key in job.result()]
        return Batch(
            images=_as_tensor(self._images),
            masks=None if self._masks is None else _as_tensor(self._masks),
            noise=None if self._noise is None else torch.from_numpy(self._noise),
            keys=keys,
            positions=self._request.positions,
            step=self._request.step,
            wait=time.perf_counter() - started,
        )
