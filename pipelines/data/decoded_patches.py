"""Stored patches as pictures, some of them kept in memory."""

import threading
from typing import NamedTuple

from PIL import Image

from pipelines.data.images import decode_png
from pipelines.data.shard_format import Split
from pipelines.data.shard_set import ShardSet
from pipelines.errors import CodecmillError


class Patch(NamedTuple):
    """A sample's key, its picture (mode RGB), and its mask (mode L) where it has one and they are asked for."""

    key: str
    image: Image.Image
    mask: Image.Image | None


class DecodedPatches:
    """The patches of one split; the first `kept` that are asked for stay decoded. May be used from several threads.

    The first, not the latest: an epoch asks for each patch once, and what was met last is what comes last again.

    Args:
        kept: a count.
    """

    def __init__(self, shard_set: ShardSet, split: Split, with_masks: bool, kept: int = 0):
        self._shard_set = shard_set
        self._split: Split = split
        self._with_masks = with_masks
        self._most = kept
        self._kept: dict[tuple[int, int], Patch] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, index: int) -> Patch:
        """A patch, checked against its checksum when it is decoded.

        Raises:
            CodecmillError: it cannot be read, or is no RGB picture.
        """
        place = shard, index
        patch = self._kept.get(place)
        if patch is None:
            patch = self._decode(*place)
            with self._lock:
                if len(self._kept) < self._most:
                    self._kept[place] = patch
        return patch

    def _decode(self, shard: int, index: int) -> Patch:
        sample = self._shard_set.read(self._split, shard, index)
        image = decode_png(sample.image)
        if image.mode != "RGB":
            raise CodecmillError(f"Sample {sample.key} is none of codecmill's: its picture has mode {image.mode}.")
        mask = decode_png(sample.mask) if sample.mask and self._with_masks else None
        return Patch(sample.key, image, mask)
