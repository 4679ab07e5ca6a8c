"""A finished shard set: its samples, each checked when it is read."""

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal import isal_zlib

from pipelines.data import remote_sets, suspects
from pipelines.data.images import Normalization
from pipelines.data.order import SampleOrder
from pipelines.data.read_ahead import ReadAhead
from pipelines.data.shard_cache import ShardCache, cache_bytes
from pipelines.data.shard_format import SPLITS, Manifest, ShardRow, SourceRow, Split, read_sources
from pipelines.data.shard_index import read_index
from pipelines.data.shard_verification import verify_shard
from pipelines.errors import CodecmillError
from pipelines.file_digests import difference

AGAIN = "It is made again, and no other, by: codecmill resume RUN (or codecmill shards). Or restore it from a copy."
OPEN_TARS = 128
"""Tars kept open at a time by one set: more than the default shuffle window, far fewer than a process may open."""

INDEX_BYTES = 128 * 2**20
"""Of indexes that one set keeps: a window of 1.8 million samples, far more than the default one has. To read one again
takes as long as to read hundreds of samples."""


class Sample(NamedTuple):
    """One sample as it is stored: the PNG files of the image and of the mask, and the JSON.

    They are views of one block of memory: a copy of each took a twentieth of all that loading costs.
    """

    key: str
    image: memoryview
    mask: memoryview | None
    json: memoryview

    @property
    def info(self) -> dict[str, Any]:
        """What the JSON says."""
        return json.loads(bytes(self.json))


class RawSample(NamedTuple):
    """The bytes of a sample as they lie in its tar, unchecked, and its row of the shard's index."""

    span: np.void
    content: bytes


class _OpenTar:
    """A tar's descriptor. Reading by `pread` meets a file cut short with an error, not with SIGBUS."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class _DamagedError(Exception):
    """What was read of a shard is not what was written."""


class ShardSet:
    """A complete shard set on disk, or one in a store of which shards are here; may be read from several threads."""

    def __init__(self, path: Path, manifest: Manifest, cache: ShardCache | None = None):
        self.path = path
        self.manifest = manifest
        self._cache = cache
        self._rows = {split: [row for row in manifest.shards if row.split == split] for split in SPLITS}
        self._tars: OrderedDict[str, _OpenTar] = OrderedDict()
        self._indexes: OrderedDict[str, np.ndarray] = OrderedDict()
        self._most_indexes = max(1, INDEX_BYTES // max((1, *(row.index_bytes for row in manifest.shards))))
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> "ShardSet":
        """Open the set in a folder, after a look at the size of every file, where all are to be there.

        Raises:
            CodecmillError: the manifest or a file is missing, damaged or of another size, or was found to be damaged.
        """
        manifest = Manifest.read(path)
        if (url := remote_sets.origin(path)) is not None:
            return cls(path, manifest, ShardCache(path, url, manifest.shards, cache_bytes()))
        if names := suspects.still_damaged(path, manifest.shards):
            raise CodecmillError(f"{path / names[0]}.tar was damaged when it was read. {AGAIN}")
        for row in manifest.shards:
            for name, size, _ in row.files():
                _check_size(path / name, size)
        return cls(path, manifest)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def measured(self) -> Normalization:
        """Mean and standard deviation of the training split."""
        return Normalization(self.manifest.mean, self.manifest.std)

    @property
    def test_set_sha256(self) -> str:
        """Names the pixels of the test split; two sets with the same one can be compared."""
        return self.manifest.test_set_sha256

    def rows(self, split: Split) -> list[ShardRow]:
        """The shards of a split."""
        return self._rows[split]

    def counts(self, split: Split) -> list[int]:
        """Samples of each shard of a split."""
        return [row.samples for row in self.rows(split)]

    def sources(self, split: Split) -> Iterator[SourceRow]:
        """The sources of a split, in stored order.

        Raises:
            CodecmillError: a list of them is damaged, or is not that of its shard.
        """
        for row in self.rows(split):
            if self._cache:
                self._cache.small(row.sources, row.sources_bytes, row.sources_sha256)
            file, listed = self.path / row.sources, 0
            for source in read_sources(file):
                listed += source.samples
                yield source
            if listed != row.samples:
                raise CodecmillError(
                    f"{file} is damaged: it lists {listed} samples, and its shard has {row.samples}. "
                    "Delete the file and run: codecmill shards"
                )

    def read_ahead(self, order: SampleOrder, position: int, end: int) -> AbstractContextManager[ReadAhead | None]:
        """Fetch training shards before they are read, for the duration; None where all are here.

        Args:
            order: of the training samples; `position`, `end`: in it, from which on and before which they are read.
        """
        if self._cache is None:
            return nullcontext()
        return ReadAhead(self._cache, self.rows("train"), order, position, end)

    def samples(self, split: Split) -> Iterator[Sample]:
        """All samples of a split, in stored order."""
        for shard, count in enumerate(self.counts(split)):
            for index in range(count):
                yield self.read(split, shard, index)

    def raw(self, split: Split, shard: int, index: int) -> RawSample | None:
        """A sample for `read` to take, unchecked: all of it that waits for a disk or a store.

        None where the shard's index is damaged, which `read` will find, too, and knows what to do about.

        Raises:
            CodecmillError: it cannot be read.
        """
        try:
            return self._raw(self.rows(split)[shard], index)
        except _DamagedError:
            return None

    def read(self, split: Split, shard: int, index: int, raw: RawSample | None = None) -> Sample:
        """One sample, its checksum compared.

        Args:
            raw: what was read of it before.

        Raises:
            CodecmillError: what is read is not what was written; names the shard and the sample.
        """
        row = self.rows(split)[shard]
        if raw is not None:
            # Where it is damaged, what lies there now counts: the shard may have been fetched anew since.
            with suppress(_DamagedError):
                return self._checked(row, index, raw)
        try:
            return self._checked(row, index, self._raw(row, index))
        except _DamagedError as error:
            if self._cache is None:
                raise self._marked(row, str(error)) from None
        # Damaged after it was fetched: the store has it as it was.
        with self._lock:
            self._indexes.pop(row.name, None)
        self._cache.discard(row)
        try:
            return self._checked(row, index, self._raw(row, index))
        except _DamagedError as error:
            raise CodecmillError(f"{error}, and so is what the store gives. See codecmill verify.") from None

    def _raw(self, row: ShardRow, index: int) -> RawSample:
        span = self._index(row)[index]
        try:
            with self._descriptor(row) as descriptor:
                return RawSample(span, os.pread(descriptor, int(span["size"]), int(span["offset"])))
        except OSError as error:
            raise CodecmillError(f"{self.path / row.tar} cannot be read: {error.strerror}.") from error

    def _checked(self, row: ShardRow, index: int, raw: RawSample) -> Sample:
        span, content = raw
        if len(content) != span["size"] or isal_zlib.crc32(content) != span["crc32"]:
            how = "its checksum is not that of what was written"
            raise _DamagedError(f"Sample {index} of {self.path / row.tar} is damaged: {how}")
        try:
            key = content[:100].partition(b".")[0].decode("ascii")
        except ValueError as error:
            raise CodecmillError(f"Sample {index} of {self.path / row.tar} is none of codecmill's: {error}.") from error
        image, mask, told = (_member(content, span, name) for name in ("image", "mask", "json"))
        return Sample(key, image, mask or None, told)

    def _index(self, row: ShardRow) -> np.ndarray:
        with self._lock:
            if row.name in self._indexes:
                self._indexes.move_to_end(row.name)
                return self._indexes[row.name]
        index = self._read_index(row)  # without the lock: other threads read what is known
        with self._lock:
            self._indexes[row.name] = index
            if len(self._indexes) > self._most_indexes:
                self._indexes.popitem(last=False)
        return index

    def _read_index(self, row: ShardRow) -> np.ndarray:
        if self._cache:
            self._cache.small(row.index, row.index_bytes, row.index_sha256)
        how = difference(self.path / row.index, row.index_bytes, row.index_sha256)
        if how:
            raise _DamagedError(f"{self.path / row.index} {how}")
        return read_index(self.path / row.index, row.samples, row.bytes)

    @contextmanager
    def _descriptor(self, row: ShardRow) -> Iterator[int]:
        """Of a shard's tar, for as long as a sample is read: one that lies in a store may be evicted between two."""
        if self._cache is None:
            tar = self._tar(row)  # which another thread may cease to keep open
            yield tar.descriptor
            return
        descriptor = self._cache.hold(row)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _tar(self, row: ShardRow) -> _OpenTar:
        """A tar that is on disk, open as long as somebody has this."""
        with self._lock:
            if row.name in self._tars:
                self._tars.move_to_end(row.name)
            else:
                self._tars[row.name] = self._open_tar(row)
                if len(self._tars) > OPEN_TARS:
                    self._tars.popitem(last=False)
            return self._tars[row.name]

    def _open_tar(self, row: ShardRow) -> _OpenTar:
        try:
            return _OpenTar(os.open(self.path / row.tar, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise CodecmillError(f"{error.filename} cannot be opened: {error.strerror}. {AGAIN}") from error

    def _marked(self, row: ShardRow, what: str) -> CodecmillError:
        is_marked = suspects.mark(self.path, row.name)
        return CodecmillError(f"{what}. {AGAIN if is_marked else 'Delete the file and run: codecmill shards'}")

    def verify(self) -> list[str]:
        """Read everything; returns what is wrong, a sentence each."""
        found = (damage for row in self.manifest.shards for damage in verify_shard(self.path, row))
        return [f"{file} {how}." for file, how in found]


def _check_size(file: Path, size: int) -> None:
    try:
        found = file.stat().st_size
    except OSError as error:
        raise CodecmillError(f"{file} cannot be read: {error.strerror}. {AGAIN}") from error
    if found != size:
        raise CodecmillError(f"{file} has {found} bytes, but the manifest says {size}. {AGAIN}")


def _member(content: bytes, span: np.void, name: str) -> memoryview:
    start = int(span[f"{name}_offset"])
    return memoryview(content)[start : start + int(span[f"{name}_size"])]
