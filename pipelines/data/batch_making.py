"""Batches in the making: threads read ahead what they are made of, and decode it where that costs the step least."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipelines.config import RunConfig, TrainingConfig
from pipelines.data.decoded_patches import DecodedPatches, Patch
from pipelines.data.randomness import random_generator
from pipelines.data.shard_set import RawSample
from pipelines.data.transforms import Draw
from pipelines.processor_cores import usable_cores

AHEAD = 3
"""Batches made, or at least read, ahead of the one that is trained on."""

MOST_TOGETHER = 8
"""Samples of a batch that one job makes: starting it costs a twentieth of what it takes to make a sample."""

_T = TypeVar("_T")

Place = tuple[int, int, int]
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
        wait: seconds that the caller waited for what it is made of; for all of it, where it was made beside the steps.
        decoding: seconds that it took, between two steps, to make it of that; 0 where it was made beside them.
    """

    images: Tensor
    masks: Tensor | None
    noise: Tensor | None
    keys: list[str]
    positions: list[int]
    step: int
    wait: float
    decoding: float


class Request(NamedTuple):
    """A batch to be made: what each of its samples is made of lies at its place in `places`."""

    step: int
    positions: list[int]
    places: list[Place]


@dataclass(frozen=True)
class Recipe:
    """What is alike in all batches that are made.

    Attributes:
        draw: what is done to the patch of a place.
        noise_shape: of the noise that the model takes for a sample, drawn here, where nothing waits for it; or None.
    """

    config: RunConfig
    patches: DecodedPatches
    draw: Callable[[Place, Patch], Draw]
    noise_shape: tuple[int, ...] | None = None


@contextmanager
def batches(recipe: Recipe, requests: Iterator[Request]) -> Iterator[Iterator[Batch]]:
    """The batches that are asked for, in that order, some of them in the making; the threads end with the context.

    An error arrives with the batch that it belongs to.
    """
    between = threads_between_steps(recipe.config.training)
    # Each has its own threads: a store that keeps those that read waiting holds back nothing that is in memory.
    with _Threads(recipe.config.data.workers) as beside, _Threads(between or 1) as decoding:
        begin = partial(_Making, recipe=recipe, beside=beside, between=decoding if between else None)
        with closing(_ready(requests, begin)) as ready:
            yield ready


def threads_between_steps(training: TrainingConfig) -> int | None:
    """How many threads decode batches between two steps; None where batches are decoded beside the steps.

    Where a step's threads take all cores, each of its operators ends with the slowest of them: what is decoded beside a
    step takes its whole CPU time from it, but between two steps only that divided by the cores. Reading goes on beside
    the step either way.
    """
    threads = training.threads
    if training.device != "cpu" or threads == "auto" or threads < max(2, usable_cores()):
        return None
    return threads


def _ready(requests: Iterator[Request], begin: Callable[[Request], "_Making"]) -> Generator[Batch, None, None]:
    """Keep `AHEAD` batches in the making."""
    underway = deque(map(begin, islice(requests, AHEAD + 1)))
    while underway:
        batch = underway.popleft().result()
        # Afterwards: a thread that wakes up for a new job may take the processor from this one, which is awaited.
        underway.extend(map(begin, islice(requests, AHEAD - len(underway))))
        yield batch


class _Threads(ThreadPoolExecutor):
    """Threads that end with the `with` block, and share a batch's samples out among them."""

    def __init__(self, count: int):
        super().__init__(count, thread_name_prefix="loading")
        self._count = count

    def share(self, do: Callable[[range], _T], samples: int) -> list[Future[_T]]:
        """Begin to do something, for some samples in each job: one for every sample would cost as much as the rest."""
        each = min(MOST_TOGETHER, -(-samples // self._count))
        return [self.submit(do, range(samples)[i : i + each]) for i in range(0, samples, each)]

    def __exit__(self, *_: object) -> None:
        self.shutdown(wait=True, cancel_futures=True)


class _Making:
    """A batch that threads fill: what they write to is the batch itself, and nothing is put together afterwards.

    Args:
        beside: threads that work beside the steps.
        between: those that decode it when it is wanted, and leave only the reading to the others; or None.
    """

    def __init__(self, request: Request, recipe: Recipe, beside: _Threads, between: _Threads | None):
        samples = len(request.places)
        self._request, self._recipe, self._between = request, recipe, between
        self._batch_images, self._batch_masks = room(recipe.config, samples)
        self._batch_noise = None
        if recipe.noise_shape is not None:
            self._batch_noise = _room(recipe.config, torch.float32, samples, *recipe.noise_shape)
        self._images = self._batch_images.numpy()
        self._masks = None if self._batch_masks is None else self._batch_masks.numpy()
        self._noise = None if self._batch_noise is None else self._batch_noise.numpy()
        self._raw: list[RawSample | None] = [None] * samples
        self._reading = beside.share(self._read, samples) if between else []
        self._filling = [] if between else beside.share(self._fill, samples)

    def _read(self, samples: range) -> None:
        for i in samples:
            _, shard, index = self._request.places[i]
            self._raw[i] = self._recipe.patches.raw(shard, index)

    def _fill(self, samples: range) -> list[str]:
        """Make some of the samples; returns their keys."""
        keys = []
        for i in samples:
            place = self._request.places[i]
            patch = self._recipe.patches.read(*place[1:], self._raw[i])
            drawn = self._recipe.draw(place, patch)
            drawn.put(patch.image, self._images[i])
            if patch.mask and self._masks is not None:
                drawn.put(patch.mask, self._masks[i])
            if self._noise is not None:
                key = self._request.step, self._request.positions[i], "noise"
                random_generator(self._recipe.config.seed, *key).random(dtype=np.float32, out=self._noise[i])
                self._noise[i] -= 0.5
            keys.append(patch.key)
        return keys

    def result(self) -> Batch:
        """The batch, when it is made.

        Raises:
            CodecmillError: a sample cannot be read.
        """
        started = time.perf_counter()
        for part in self._reading:
            part.result()
        read = time.perf_counter()
        if self._between:
            self._filling = self._between.share(self._fill, len(self._raw))
        keys = [key for part in self._filling for key in part.result()]
        filled = time.perf_counter()
        decoding = filled - read if self._between else 0.0
        return Batch(
            images=channels_first(self._batch_images),
            masks=None if self._batch_masks is None else channels_first(self._batch_masks),
            noise=self._batch_noise,
            keys=keys,
            positions=self._request.positions,
            step=self._request.step,
            wait=filled - started - decoding,
            decoding=decoding,
        )


def room(config: RunConfig, samples: int) -> tuple[Tensor, Tensor | None]:
    """Images (N, S, S, 3), anything, and masks (N, S, S, 1), black, where the run has them: uint8."""
    side = config.training.crop_size
    images = _room(config, torch.uint8, samples, side, side, 3)
    return images, None if config.data.masks is None else _room(config, torch.uint8, samples, side, side, 1).zero_()


def _room(config: RunConfig, dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory that threads write to; of a GPU's batch it is pinned, so that the copy goes on beside the steps before.

    It stays a tensor of torch's, which gives pinned memory to no other before such a copy has ended.
    """
    return torch.empty(shape, dtype=dtype, pin_memory=config.training.device == "cuda")


def channels_first(levels: Tensor) -> Tensor:
    """(N, C, S, S), the same memory: the channels stay the fastest dimension, as they are in a picture."""
    return levels.permute(0, 3, 1, 2)
