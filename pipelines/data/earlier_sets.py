"""Complete shard sets of the same settings under the same root: what did not change is taken over from them."""

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.data import remote_sets, suspects
from pipelines.data.shard_format import MANIFEST, Manifest, ShardRow, SourceRow, Split, is_whole, read_sources
from pipelines.data.shard_index import read_index
from pipelines.errors import CodecmillError
from pipelines.file_digests import file_sha256

NEWEST = 2
"""Sets that are looked at; reading the sources of all would take longer with every set."""


@dataclass(frozen=True)
class _Place:
    folder: Path
    shard: ShardRow
    first: int
    row: SourceRow


class EarlierSets:
    """The shards and sources of the newest complete sets made with the same settings.

    Args:
        shards: the folder of all sets.
        verify: believe a tar only after its sha256 was taken. Where a damaged set is repaired, another one that
            shares its files may be damaged as well.
    """

    def __init__(self, shards: Path, settings_digest: str, verify: bool):
        self._places: dict[tuple[str, Split], _Place] = {}
        self._shards: dict[str, tuple[Path, ShardRow]] = {}
        self._useless: dict[str, tuple[Literal["broken", "skipped"], str]] = {}
        found: list[tuple[int, Path, Manifest]] = []
        for file in shards.glob("[0-9a-f]*/manifest.json"):
            try:
                manifest = Manifest.read(file.parent)
                # What lies in a store may be evicted here at any moment.
                may_go = remote_sets.origin(file.parent) is not None
            except CodecmillError:
                continue  # damaged, or of another version: nothing is taken from it
            if manifest.settings_digest == settings_digest and not may_go:
                found.append((file.stat().st_mtime_ns, file.parent, manifest))
        newest = sorted(found, key=lambda entry: entry[:2], reverse=True)[:NEWEST]
        for _, folder, _ in reversed(newest):
            with suppress(OSError):  # another user's
                os.utime(folder / MANIFEST)  # no cleaning takes it for unused meanwhile
        for _, folder, manifest in newest:
            self._take(folder, manifest, verify)

    def _take(self, folder: Path, manifest: Manifest, verify: bool) -> None:
        for row in manifest.set_aside:
            if row.status != "duplicate" and row.sha256:
                self._useless.setdefault(row.sha256, (row.status, row.reason))
        marked = suspects.marked(folder)
        for shard in manifest.shards:
            if shard.name in marked or not _is_sound(folder, shard, with_tar=verify):
                continue
            self._shards.setdefault(shard.inputs, (folder, shard))
            first = 0
            for row in read_sources(folder / shard.sources):
                self._places.setdefault((row.sha256, shard.split), _Place(folder, shard, first, row))
                first += row.samples

    def shard(self, inputs: str) -> tuple[Path, ShardRow] | None:
        """A shard with these inputs, and the folder where it is."""
        return self._shards.get(inputs)

    def useless(self, sha256: str, split: Split) -> tuple[Literal["broken", "skipped"], str] | None:
        """Why a source gave no sample, if it did not; what is skipped as patches may be whole images for the test."""
        found = self._useless.get(sha256)
        return None if found and found[0] == "skipped" and split == "test" else found

    def row(self, sha256: str, split: Split) -> SourceRow | None:
        """What is known of a source that gave samples for this split."""
        place = self._places.get((sha256, split))
        return place.row if place else None

    def samples(self, sha256: str, split: Split) -> tuple[Path, np.ndarray]:
        """The tar that holds a source's samples, and their SPAN records in it."""
        place = self._places[sha256, split]
        index = _index(place.folder / place.shard.index, place.shard.samples, place.shard.bytes)
        return place.folder / place.shard.tar, index[place.first : place.first + place.row.samples]


def _is_sound(folder: Path, shard: ShardRow, with_tar: bool) -> bool:
    """Whether the files of a shard are what was written.

    A flipped bit in a tar is found by its samples' checksums, when they are read. One in the small files would be
    believed, and sealed anew in the manifest of the next set.
    """
    if not all(is_whole(folder / name, size) for name, size, _ in shard.files()):
        return False
    read = [(name, sha256) for name, _, sha256 in shard.files() if with_tar or name != shard.tar]
    return all(file_sha256(folder / name) == sha256 for name, sha256 in read)


@lru_cache(maxsize=4)
def _index(file: Path, samples: int, tar_bytes: int) -> np.ndarray:
    """Sources that follow each other lie in the same shard."""
    return read_index(file, samples, tar_bytes)
