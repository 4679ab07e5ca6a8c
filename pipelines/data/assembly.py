"""Putting shards together: the samples of several sources, wherever they lie, become a tar with its index."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from isal import isal_zlib

from pipelines.data.shard_format import ShardRow, SourceRow, Split, canonical, write_sources
from pipelines.data.shard_index import write_index
from pipelines.durable_files import link_or_copy, sync_file
from pipelines.errors import CodecmillError
from pipelines.file_digests import file_sha256

RECORD = 10_240
"""A tar ends with two empty blocks and is filled up to a multiple of this, as webdataset's writer leaves it."""


class DamagedPieceError(CodecmillError):
    """The samples of a source are not what was encoded.

    Attributes:
        file: they lie in it: a part, or the tar of an earlier shard.
    """

    def __init__(self, file: Path):
        super().__init__(f"{file} is damaged. Delete it and run: codecmill shards")
        self.file = file


@dataclass(frozen=True)
class Piece:
    """The samples of one source: the file that they lie in, and their SPAN records in it."""

    row: SourceRow
    file: Path
    spans: np.ndarray


@dataclass(frozen=True)
class Outline:
    """A shard to be made; `inputs` names what goes into it: equal inputs, equal tar and index."""

    name: str
    split: Split
    inputs: str


def inputs_digest(settings_digest: str, split: Split, hashes: Sequence[str]) -> str:
    return hashlib.sha256(canonical([settings_digest, split, list(hashes)])).hexdigest()


def write_shard(folder: Path, outline: Outline, pieces: Sequence[Piece]) -> ShardRow:
    """Write a tar, its index and its sources, durably.

    Raises:
        DamagedPieceError: the samples of a piece are not what was encoded.
    """
    digest = hashlib.sha256()
    spans = np.concatenate([piece.spans for piece in pieces])
    ends = np.cumsum(spans["size"])
    spans["offset"] = ends - spans["size"]
    length = int(ends[-1])
    tar_file, index = (folder / f"{outline.name}{suffix}" for suffix in (".tar", ".index"))
    for file in (tar_file, index):
        file.unlink(missing_ok=True)  # a killed attempt may have left there an earlier set's very file, by `link_shard`
    with tar_file.open("wb") as tar:
        for content in _contents(pieces):
            tar.write(content)
            digest.update(content)
        end = bytes(-(-(length + 1024) // RECORD) * RECORD - length)
        tar.write(end)
        digest.update(end)
    write_index(index, spans)
    return _finish(folder, outline, [piece.row for piece in pieces], digest.hexdigest(), file_sha256(index))


def link_shard(folder: Path, outline: Outline, rows: Sequence[SourceRow], earlier: Path, shard: ShardRow) -> ShardRow:
    """Take over the tar and the index of an earlier shard with the same inputs; only the paths are written anew."""
    for before, after in ((shard.tar, f"{outline.name}.tar"), (shard.index, f"{outline.name}.index")):
        (folder / after).unlink(missing_ok=True)
        link_or_copy(earlier / before, folder / after)
    return _finish(folder, outline, rows, shard.sha256, shard.index_sha256)


def _finish(folder: Path, outline: Outline, rows: Sequence[SourceRow], tar_sha256: str, index_sha256: str) -> ShardRow:
    tar, index, sources = (folder / f"{outline.name}{suffix}" for suffix in (".tar", ".index", ".sources.jsonl"))
    write_sources(sources, rows)
    for file in (tar, index, sources):
        sync_file(file)
    return ShardRow(
        name=outline.name,
        split=outline.split,
        samples=sum(row.samples for row in rows),
        bytes=tar.stat().st_size,
        sha256=tar_sha256,
        index_bytes=index.stat().st_size,
        index_sha256=index_sha256,
        sources_bytes=sources.stat().st_size,
        sources_sha256=file_sha256(sources),
        inputs=outline.inputs,
    )


def _contents(pieces: Sequence[Piece]) -> Iterator[bytes]:
    for piece in pieces:
        with piece.file.open("rb") as file:
            file.seek(int(piece.spans["offset"][0]))
            for size, checksum in zip(piece.spans["size"].tolist(), piece.spans["crc32"].tolist(), strict=True):
                content = file.read(size)
                if len(content) != size or isal_zlib.crc32(content) != checksum:
                    raise DamagedPieceError(piece.file)
                yield content
