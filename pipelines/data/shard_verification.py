"""Everything about a shard read again: its three files, and in the tar each sample for itself."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from isal import isal_zlib

from pipelines.data.shard_format import Manifest, ShardRow, fingerprint_of, settings_digest_of
from pipelines.data.shard_index import parsed_index
from pipelines.file_digests import CHUNK, Heard, difference, differing, unheard

NAMED = 5
"""Damaged samples of a tar that are named one by one."""


class Damage(NamedTuple):
    """A file that is not as it was written; `how` is the rest of a sentence that begins with its path."""

    file: Path
    how: str


def verify_shard(folder: Path, row: ShardRow, heard: Heard = unheard) -> Iterator[Damage]:
    """Compare a shard's files with its row of the manifest, and every sample with its checksum in the index."""
    index, sources = folder / row.index, folder / row.sources
    how = difference(index, row.index_bytes, row.index_sha256, heard)
    spans, unusable = (None, None) if how else _spans(index, row)
    if how or unusable:
        yield Damage(index, how or f"is no index of its tar: {unusable}")
    how = _tar_difference(folder / row.tar, row, spans, heard)
    if how:
        yield Damage(folder / row.tar, how)
    how = difference(sources, row.sources_bytes, row.sources_sha256, heard)
    if how:
        yield Damage(sources, how)


def settings_difference(manifest: Manifest) -> str | None:
    """How a manifest's settings contradict the digest of them that it names."""
    found = settings_digest_of(manifest.settings, manifest.versions)
    return None if found == manifest.settings_digest else "contradicts itself: settings_digest is not of its settings"


def fingerprint_difference(manifest: Manifest, used: Iterable[str]) -> str | None:
    """How a set contradicts its name, which is a hash of all that it was made of.

    Args:
        used: hashes of the sources that gave samples.
    """
    useless = (row.sha256 for row in manifest.set_aside if row.sha256 and row.status != "duplicate")
    found = fingerprint_of(manifest.settings_digest, sorted({*used, *useless}))
    if found == manifest.fingerprint:
        return None
    return f"contradicts itself: its sources make the set {found[:16]}, not {manifest.fingerprint[:16]}"


def _spans(index: Path, row: ShardRow) -> tuple[np.ndarray | None, str | None]:
    """The rows of an index, or why they cannot be used: they must lie one behind the other in the tar."""
    try:
        return parsed_index(index.read_bytes(), row.samples, row.bytes), None
    except (OSError, ValueError) as error:
        return None, str(error)


def _tar_difference(tar: Path, row: ShardRow, spans: np.ndarray | None, heard: Heard) -> str | None:
    if spans is None or not tar.is_file() or tar.stat().st_size != row.bytes:
        return difference(tar, row.bytes, row.sha256, heard)
    try:
        with tar.open("rb") as stream:
            found, damaged = _read_samples(stream, spans, heard)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    how = differing(found, row.sha256)
    if not damaged:
        return f"{how}, though no sample of it is damaged" if how else None
    listed = ", ".join(map(str, damaged[:NAMED])) + (", ..." if len(damaged) > NAMED else "")
    of = f"{len(damaged)} of its {len(spans)} samples, with the numbers" if len(damaged) > 1 else "its sample"
    return f"{how or 'is not what its index says'}; damaged: {of} {listed}"


def _read_samples(stream: BinaryIO, spans: np.ndarray, heard: Heard) -> tuple[str, list[int]]:
    """A tar's sha256, and the numbers of the samples whose checksum is not theirs, in one reading."""
    digest = hashlib.sha256()
    damaged = []
    for number, (size, checksum) in enumerate(zip(spans["size"].tolist(), spans["crc32"].tolist(), strict=True)):
        content = stream.read(size)
        digest.update(content)
        heard(len(content))
        if isal_zlib.crc32(content) != checksum:
            damaged.append(number)
    while rest := stream.read(CHUNK):
        digest.update(rest)
        heard(len(rest))
    return digest.hexdigest(), damaged
