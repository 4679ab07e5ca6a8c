"""From shards to batches: samples in their order, decoded ahead by threads, the same whatever their number."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.config import RunConfig
from pipelines.data.decoded_patches import DecodedPatches, Patch
from pipelines.data.order import SampleOrder
from pipelines.data.shard_set import ShardSet
from pipelines.data.transforms import Draw, draw

AHEAD = 3
"""Batches decoded ahead of the one that is trained on."""


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch.

    Attributes:
        images: uint8 (n, 3, S, S).
        masks: uint8 (n, 1, S, S), zeros for an image without one; None where the run has no masks.
        keys: the samples' keys.
        positions: their positions in the endless order; in validation, in the split.
        step: the optimiser step that it is for, from 1; 0 in validation.
        wait: seconds that the caller waited for it.
    """

    images: Tensor
    masks: Tensor | None
    keys: list[str]
    positions: list[int]
    step: int
    wait: float


class _Item(NamedTuple):
    key: str
    image: np.ndarray
    mask: np.ndarray | None


class _Request(NamedTuple):
    """A batch to be made, and what makes each of its items."""

    step: int
    positions: list[int]
    makers: list[Callable[[], _Item]]


@contextmanager
def training_batches(
    shard_set: ShardSet, config: RunConfig, first_step: int, rank: int, world_size: int
) -> Iterator[Iterator[Batch]]:
    """The batches of one rank from a step on, without end; the threads end with the context.

    Step s reads the positions (s - 1) * batch_size ... s * batch_size - 1 of the order. Of these a rank takes every
    `world_size`-th, from its own number on: as many in every step, since a compiled step sees one shape only.

    Raises:
        CodecmillError: a sample cannot be read; from the iterator, at the batch that holds it.
    """
    order = SampleOrder(shard_set.counts("train"), config.seed, config.data.shuffle_window)
    size = config.training.batch_size

    with_masks = config.data.masks is not None
    patches = DecodedPatches(shard_set, "train", with_masks, config.data.decoded_cache)

    def make(epoch: int, shard: int, index: int) -> _Item:
        patch = patches.read(shard, index)
        drawn = draw(config.data, config.training.crop_size, patch.image.size, config.seed, epoch, patch.key)
        return _item(patch, drawn, with_masks)

    def requests() -> Iterator[_Request]:
        step = first_step
        while True:
            positions = list(range((step - 1) * size + rank, step * size, world_size))
            places = zip(*(found.tolist() for found in order.locate_many(np.array(positions))), strict=True)
            yield _Request(step, positions, [partial(make, *place) for place in places])
            step += 1

    with ThreadPoolExecutor(config.data.workers, thread_name_prefix="loading") as pool:
        batches = _batches(pool, requests())
        try:
            yield batches
        finally:
            batches.close()
            pool.shutdown(wait=True, cancel_futures=True)


def validation_batches(shard_set: ShardSet, config: RunConfig, rank: int, world_size: int) -> Iterator[Batch]:
    """The middle of every patch of the validation split, in stored order; a rank takes every `world_size`-th batch.

    With virtual ranks the batches are the same whatever the number of ranks, and so are the model's bits on them.
    """
    places = [(shard, i) for shard, count in enumerate(shard_set.counts("validation")) for i in range(count)]
    size = max(1, config.training.batch_size // (config.training.virtual_ranks or world_size))

    with_masks = config.data.masks is not None
    patches = DecodedPatches(shard_set, "validation", with_masks)

    def make(position: int) -> _Item:
        patch = patches.read(*places[position])
        return _item(patch, _centre(patch.image.size, config.training.crop_size), with_masks)

    shares = [list(range(len(places))[i : i + size]) for i in range(rank * size, len(places), world_size * size)]
    requests = (_Request(0, share, [partial(make, position) for position in share]) for share in shares)
    with ThreadPoolExecutor(config.data.workers, thread_name_prefix="loading") as pool:
        try:
            yield from _batches(pool, requests)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _centre(size: tuple[int, int], side: int) -> Draw:
    return Draw((size[0] - side) // 2, (size[1] - side) // 2, side, side)


def _batches(pool: ThreadPoolExecutor, requests: Iterator[_Request]) -> Generator[Batch, None, None]:
    """Keep `AHEAD` batches in the making; an error arrives with the batch that it belongs to."""
    underway: deque[tuple[_Request, list[Future[_Item]]]] = deque()
    ended = False
    while True:
        while not ended and len(underway) <= AHEAD:
            request = next(requests, None)
            if request is None:
                ended = True
            else:
                underway.append((request, [pool.submit(maker) for maker in request.makers]))
        if not underway:
            return
        request, futures = underway.popleft()
        started = time.perf_counter()
        items = [future.result() for future in futures]
        yield _collate(request, items, time.perf_counter() - started)


def _item(patch: Patch, drawn: Draw, with_mask: bool) -> _Item:
    image = np.asarray(drawn.apply(patch.image)).transpose(2, 0, 1)
    if not with_mask:
        return _Item(patch.key, image, None)
    mask = np.asarray(drawn.apply_to_mask(patch.mask)) if patch.mask else np.zeros(image.shape[1:], np.uint8)
    return _Item(patch.key, image, mask[None])


def _collate(request: _Request, items: list[_Item], wait: float) -> Batch:
    masks = [item.mask for item in items if item.mask is not None]
    return Batch(
        images=torch.from_numpy(np.stack([item.image for item in items])),
        masks=torch.from_numpy(np.stack(masks)) if masks else None,
        keys=[item.key for item in items],
        positions=request.positions,
        step=request.step,
        wait=wait,
    )
