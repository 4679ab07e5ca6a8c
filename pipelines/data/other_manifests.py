"""Manifests of the same shard set that differ in paths alone: what checkpoints of other machines know it by.

The same images may lie elsewhere on another machine. Its set has the same tars, but its manifest and lists of sources
say other paths. Where both meet in a store, the one that came first stays; the other is kept beside it.
"""

from pathlib import Path

from pipelines.data.shard_format import MANIFEST, Manifest
from pipelines.errors import CodecmillError
from pipelines.file_digests import file_sha256

FOLDER = "manifests"
"""In the set's folder: a file each, named by its sha256."""


def file_of(folder: Path, sha256: str) -> Path:
    """Where another manifest of the set in a folder is kept."""
    return folder / FOLDER / f"{sha256}.json"


def is_known_as(folder: Path, sha256: str) -> bool:
    """Whether the set in a folder is one that a checkpoint names by the sha256 of its manifest.

    Raises:
        CodecmillError: the set has no manifest that can be read.
    """
    if file_sha256(folder / MANIFEST) == sha256:
        return True
    file = file_of(folder, sha256)
    if not file.is_file() or file_sha256(file) != sha256:
        return False
    try:
        other = Manifest.in_file(file)
    except CodecmillError:
        return False
    return equal_but_for_paths(Manifest.read(folder), other)


def equal_but_for_paths(one: Manifest, other: Manifest) -> bool:
    """Whether two manifests are of the same tars, wherever the images were."""
    return _without_paths(one) == _without_paths(other)


def _without_paths(manifest: Manifest) -> Manifest:
    rows = [row.model_copy(update={"sources_sha256": "", "sources_bytes": 0}) for row in manifest.shards]
    return manifest.model_copy(update={"shards": rows, "set_aside": []})
