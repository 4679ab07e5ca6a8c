"""A set that is repaired stays the one that checkpoints name: by the sha256 of its manifest, old paths and all."""

import shutil
from pathlib import Path

from pipelines.data.other_manifests import equal_but_for_paths
from pipelines.data.shard_format import MANIFEST, Manifest
from pipelines.durable_files import json_bytes, sync_file, write_bytes
from pipelines.errors import CodecmillError
from pipelines.file_digests import difference


def write_manifest(working: Path, made: Manifest, folder: Path) -> None:
    """Complete the shards in a working folder: by the manifest and the lists of sources of the set that they repair.

    Images may have been moved or renamed since, which changes no sample. Where anything else came out otherwise, or an
    old list is damaged, the set says where the images are today.

    Args:
        folder: of the set; where it is not there, the set is new.
    """
    content = json_bytes(made.model_dump(mode="json"))
    if (old := _equal_but_for_paths(folder, made)) is not None:
        now = {row.name: row.sources_sha256 for row in made.shards}
        others = [row for row in old.shards if row.sources_sha256 != now[row.name]]
        if not any(difference(folder / row.sources, row.sources_bytes, row.sources_sha256) for row in others):
            for row in others:
                # No link: what is made in a working folder is written in place.
                shutil.copyfile(folder / row.sources, working / row.sources)
                sync_file(working / row.sources)
            content = (folder / MANIFEST).read_bytes()
    write_bytes(working / MANIFEST, content)


def _equal_but_for_paths(folder: Path, made: Manifest) -> Manifest | None:
    """The manifest in a folder if it is that of the same shards and can be read."""
    try:
        old = Manifest.read(folder)
    except CodecmillError:
        return None
    return old if equal_but_for_paths(old, made) else None
