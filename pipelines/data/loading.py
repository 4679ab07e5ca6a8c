"""From shards to batches: which samples each is made of, the same whatever the number of threads and ranks."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice

import numpy as np
import torch

from pipelines.config import RunConfig
from pipelines.data.batch_making import Batch, Place, Recipe, Request, batches, channels_first, room
from pipelines.data.decoded_patches import DecodedPatches, Patch
from pipelines.data.order import SampleOrder
from pipelines.data.read_ahead import ReadAhead
from pipelines.data.shard_set import ShardSet
from pipelines.data.transforms import Draw, draw

LOOKED_UP = 512
"""Positions of the order that are looked up at once, in whole steps, to be shared by the ranks."""


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

    def drawn(place: Place, patch: Patch) -> Draw:
        size = patch.image.width, patch.image.height
        return draw(config.data, config.training.crop_size, size, config.seed, place[0], patch.key)

    size = config.training.batch_size
    requests = _training_requests(order, size, first_step, rank, world_size)
    with (
        shard_set.read_ahead(order, (first_step - 1) * size, config.training.steps * size) as ahead,
        batches(Recipe(config, patches, drawn, noise_shape), _told(requests, ahead)) as ready,
    ):
        yield ready


def _training_requests(order: SampleOrder, size: int, first_step: int, rank: int, world_size: int) -> Iterator[Request]:
    """Without end. The places of many steps are looked up at once: numpy's calls cost more than what they do."""
    at_once = -(-LOOKED_UP // size)
    for first in count(first_step, at_once):
        shares = [range((step - 1) * size + rank, step * size, world_size) for step in range(first, first + at_once)]
        found = order.locate_many(np.concatenate(shares))
        places = zip(*(each.tolist() for each in found), strict=True)
        for step, share in enumerate(shares, first):
            yield Request(step, list(share), list(islice(places, len(share))))


def _told(requests: Iterator[Request], ahead: ReadAhead | None) -> Iterator[Request]:
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

    def drawn(place: Place, patch: Patch) -> Draw:
        return _centre(patch.image.width, patch.image.height, config.training.crop_size)

    shares = [range(len(places))[i : i + size] for i in range(rank * size, len(places), world_size * size)]
    requests = (Request(0, list(share), places[share.start : share.stop]) for share in shares)
    with batches(Recipe(config, patches, drawn), requests) as ready:
        yield from ready
    if config.training.parallel == "fsdp" and len(shares) < -(-len(places) // (world_size * size)):
        yield replace(blank_batch(config, world_size, rank), keys=[], positions=[])


def blank_batch(config: RunConfig, world_size: int, rank: int, noise_shape: tuple[int, ...] | None = None) -> Batch:
    """Black images for a rank's share of a batch, in memory as its batches are: a compiled step depends on that."""
    positions = list(range(rank, config.training.batch_size, world_size))
    images, masks = room(config, len(positions))
    images.zero_()
    return Batch(
        images=channels_first(images),
        masks=None if masks is None else channels_first(masks),
        noise=None if noise_shape is None else torch.zeros(len(positions), *noise_shape),
        keys=[""] * len(positions),
        positions=positions,
        step=0,
        wait=0.0,
        decoding=0.0,
    )


def _centre(width: int, height: int, side: int) -> Draw:
    return Draw((width - side) // 2, (height - side) // 2, side, side)
