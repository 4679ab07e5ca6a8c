"""A shard set on its way to a store: its files, and what is done where the store has the set from another machine."""

from collections.abc import Callable
from pathlib import Path

from pipelines.data import other_manifests, remote_sets, shard_format
from pipelines.errors import CodecmillError
from pipelines.file_digests import file_sha256
from pipelines.storage import keys
from pipelines.storage.patience import StoreError
from pipelines.storage.store import Store


def send_shard_set(store: Store, folder: Path, between: Callable[[], None] = lambda: None) -> None:
    """Send a complete shard set, its manifest last; what has come from this store is there already.

    Args:
        between: called after each file; a large set takes hours.

    Raises:
        StoreError: the store does not take it. CodecmillError: a file is not what the manifest says, or the set lies
            in another store.
    """
    address, source = f"{store.url}/{keys.of_shard_set(folder)}", remote_sets.origin(folder)
    if source == address:
        return
    manifest_file = folder / shard_format.MANIFEST
    sha256 = file_sha256(manifest_file)
    key = keys.of_shard_set(folder, shard_format.MANIFEST)
    if _is_known_there(store, folder, sha256):
        return
    manifest = shard_format.Manifest.read(folder)
    files = [each for row in manifest.shards for each in row.files()]
    if source is not None and not all(shard_format.is_whole(folder / name, size) for name, size, _ in files):
        raise CodecmillError(
            f"Shard set {folder.name} lies in {source}, and only some of it is here. Copy it to {address}, or delete "
            f"{folder} and have the shards made here, by `codecmill shards` of the same choices; then: "
            "codecmill sync RUN"
        )
    lists = {row.sources for row in manifest.shards}
    of_any_machine = [each for each in files if each[0] not in lists]
    of_this_one = [each for each in files if each[0] in lists]
    for name, _, digest in of_any_machine:
        store.send(folder / name, keys.of_shard_set(folder, name), digest)
        between()
    if _is_known_there(store, folder, sha256):
        return  # another has sent the same set meanwhile, with its lists
    for name, _, digest in of_this_one:
        store.send(folder / name, keys.of_shard_set(folder, name), digest)
        between()
    store.send(manifest_file, key, sha256)


def _is_known_there(store: Store, folder: Path, sha256: str) -> bool:
    """Whether the store has the set, which it is then told to know by the manifest that is here, too."""
    key = keys.of_shard_set(folder, shard_format.MANIFEST)
    there = store.find(key)
    if there is None or there.sha256 == sha256:
        return there is not None
    if not _has_same_set(store, key, shard_format.Manifest.read(folder)):
        return False
    # Our checkpoints name it by ours.
    store.send(folder / shard_format.MANIFEST, keys.of_other_manifests(folder, f"{sha256}.json"), sha256)
    return True


def _has_same_set(store: Store, key: str, manifest: shard_format.Manifest) -> bool:
    """Whether the manifest at a key is of the same set, made of images that lay elsewhere: others read by it now."""
    try:
        there = shard_format.Manifest.checked(store.read_object(key), store.address(key), "")
    except StoreError:
        raise
    except CodecmillError:
        return False  # damaged
    return other_manifests.equal_but_for_paths(there, manifest)
