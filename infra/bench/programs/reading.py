"""What all loaders are asked for: crops of 128, mirrored, normalised float32, in batches of 32; and how it is timed."""

import time
from collections.abc import Iterator
from typing import Any

from infra.bench.process_tree import Stretch
from infra.bench.programs.serving import figures

CROP, BATCH = 128, 32
MEAN = STD = (0.5, 0.5, 0.5)
WARM_UP = 8
"""Batches that are not counted: by then all workers are at work."""


def timed(started: float, batches: Iterator[Any], patches: int) -> dict[str, Any]:
    """Seconds of the steady state, and to the first batch.

    Args:
        started: `time.perf_counter()` before the loader was made.
        batches: images (32, 3, 128, 128) from a loader that has just been started.
        patches: how many are counted.
    """
    first = next(batches)
    until_first = time.perf_counter() - started
    if tuple(first.shape) != (BATCH, 3, CROP, CROP):
        raise ValueError(f"A batch has the shape {tuple(first.shape)}, not {(BATCH, 3, CROP, CROP)}.")
    for _ in range(WARM_UP - 1):
        next(batches)
    with Stretch() as stretch:
        for _ in range(patches // BATCH):
            next(batches)
    return figures(stretch, patches // BATCH * BATCH, first_batch_seconds=until_first)


def of_pictures() -> Any:
    """torchvision's transforms of a Pillow picture, as its documentation and the peers' have them."""
    from torchvision import transforms

    return transforms.Compose([*_drawn(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def of_tensors() -> Any:
    """The same of a uint8 tensor (3, H, W)."""
    import torch
    from torchvision import transforms

    return transforms.Compose([*_drawn(), transforms.ConvertImageDtype(torch.float32), transforms.Normalize(MEAN, STD)])


def _drawn() -> list[Any]:
    from torchvision import transforms

    return [transforms.RandomCrop(CROP), transforms.RandomHorizontalFlip(), transforms.RandomVerticalFlip()]
