"""Shard sets that lie in a store: here are the manifest, the address, and those shards that were read last."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.data.shard_format import MANIFEST, ShardRow
from pipelines.durable_files import built_folder, write_bytes, write_json
from pipelines.locks import lock
from pipelines.storage.address import checked_url
from pipelines.tolerant_reading import json_object, text

ORIGIN = "store.json"
"""Beside the manifest: where the set's files are fetched from."""

LONGEST_WAIT = 60.0
"""Seconds for somebody else to write down the same two files."""


def origin(folder: Path) -> str | None:
    """The address of the rest of a set; None where all of it is here, or should be.

    Raises:
        InputError: what is written down is no address.
    """
    file = folder / ORIGIN
    if not file.is_file():
        return None
    return checked_url(text(json_object(file.read_bytes()), "url") or "", str(file))


def rows_here(folder: Path, rows: Sequence[ShardRow]) -> list[ShardRow]:
    """The shards whose files should be here: all, but of a set that lies in a store those that were read last."""
    if origin(folder) is None:
        return list(rows)
    return [row for row in rows if all((folder / name).is_file() for name, _, _ in row.files())]


def make_known(folder: Path, url: str, manifest: bytes) -> None:
    """Write down a set that lies in a store, unless it is there already.

    Args:
        url: of the set's files; `manifest`: as it lies there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder.with_name(f".tmp-{folder.name}.lock"), f"Shard set {folder.name}", LONGEST_WAIT):
        if (folder / MANIFEST).is_file():
            return
        with built_folder(folder) as building:
            write_json(building / ORIGIN, {"url": url.rstrip("/")})
            write_bytes(building / MANIFEST, manifest)


def make_own(folder: Path) -> None:
    """All of the set's files are here for good: none is fetched or evicted any more."""
    (folder / ORIGIN).unlink(missing_ok=True)
