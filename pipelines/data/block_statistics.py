"""The Karhunen-Loève transform of blocks of pixels, from the training patches."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.data.images import decode_png, to_tensor
from pipelines.data.shard_set import ShardSet

MOST_PATCHES = 512
"""Enough for some 500,000 blocks of 8x8 pixels."""

FEW_SHARDS = 8
"""Shards that they are taken from, where these have so many: each is fetched whole, and has photographs at random."""


def block_transform(
    shard_set: ShardSet, size: int, count: int, alive: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """The principal components of RGB blocks of size x size pixels, float32; the same for the same shard set.

    Args:
        alive: called for each patch: shards may have to be fetched first.

    Returns:
        The rows of the transform (at most `count`, 3 * size^2), their columns in the order of pixel_unshuffle, and the
        standard deviations of their coefficients in grey levels, falling.
    """
    length = 3 * size**2
    # Sums of products of whole numbers, exact in float64 in any order.
    total, products, blocks = torch.zeros(length).double(), torch.zeros(length, length).double(), 0
    for image in _patches(shard_set):
        alive()
        height, width = (side - side % size for side in image.shape[-2:])
        columns = F.pixel_unshuffle(image[None, :, :height, :width].double(), size)[0].flatten(1)
        total += columns.sum(dim=1)
        products += columns @ columns.T
        blocks += columns.shape[1]
    mean = total / blocks
    variances, vectors = torch.linalg.eigh(products / blocks - mean[:, None] * mean)
    rows = vectors.T.flip(0)[:count]
    # An eigenvector's sign is anybody's choice: its largest element is positive.
    rows = rows * rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)).sign()
    return rows.float().contiguous(), variances.flip(0)[:count].clamp_min(0).sqrt().float().contiguous()


def _patches(shard_set: ShardSet) -> Iterator[Tensor]:
    counts = shard_set.counts("train")
    filled = [shard for shard, count in enumerate(counts) if count]
    most = min(len(filled), max(FEW_SHARDS, -(-MOST_PATCHES * len(filled) // sum(counts))))
    shards = [filled[i * len(filled) // most] for i in range(most)]
    places = ((shard, index) for shard in shards for index in range(counts[shard]))
    chosen = islice(places, 0, None, max(1, -(-sum(counts[shard] for shard in shards) // MOST_PATCHES)))
    return (to_tensor(decode_png(shard_set.read("train", shard, index).image)) for shard, index in chosen)
