"""Stored patches as pictures, some of them kept in memory."""

import threading
from typing import NamedTuple

from pipelines.data.png_reading import StoredPicture
from pipelines.data.shard_format import Split
from pipelines.data.shard_set import RawSample, ShardSet
from pipelines.errors import CodecmillError


class Patch(NamedTuple):
    """A sample's key, its picture (RGB), and its mask (grey) where it has one and they are asked for."""

    key: str
    image: StoredPicture
    mask: StoredPicture | None


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

    def raw(self, shard: int, index: int) -> RawSample | None:
        """What `read` will want of a disk or a store; None where that is nothing.

        Raises:
            CodecmillError: it cannot be read.
        """
        return None if (shard, index) in self._kept else self._shard_set.raw(self._split, shard, index)

    def read(self, shard: int, index: int, raw: RawSample | None = None) -> Patch:
        """A patch, checked against its checksum unless it was in memory.

        Args:
            raw: what was read of it before.

        Raises:
            CodecmillError: it cannot be read, or is no RGB picture.
        """
        place = shard, index
        patch = self._kept.get(place)
        if patch is None:
            patch = self._open(*place, raw)
            if len(self._kept) < self._most:
                self._keep(place, patch)
        return patch

    def _keep(self, place: tuple[int, int], patch: Patch) -> None:
        for picture in (patch.image, patch.mask):
            if picture:
                picture.decode()
        with self._lock:
            if len(self._kept) < self._most:
                self._kept[place] = patch

    def _open(self, shard: int, index: int, raw: RawSample | None) -> Patch:
        sample = self._shard_set.read(self._split, shard, index, raw)
        patch = Patch(
            sample.key,
            StoredPicture(sample.image),
            StoredPicture(sample.mask) if sample.mask and self._with_masks else None,
        )
        for what, picture, channels in (("picture", patch.image, 3), ("mask", patch.mask, 1)):
            if picture and picture.channels != channels:
                raise CodecmillError(
                    f"Sample {sample.key} is none of codecmill's: its {what} has {picture.channels} channels, "
                    f"not {channels}. Delete its shard and run: codecmill shards"
                )
        return patch
