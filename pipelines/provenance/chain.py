"""The chain that leads from a checkpoint to its data: its run, its shard set, and the choices that it was made with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import checkpoint_format
from pipelines.data import shard_format
from pipelines.durable_files import read_json
from pipelines.errors import CodecmillError
from pipelines.run_directory import Root, RunDirectory


@dataclass(frozen=True)
class Chain:
    """A checkpoint, and where on this machine that lies which it names.

    Attributes:
        run: the run that the checkpoint lies in, if it does.
        shard_folder: of its shard set, by the fingerprint alone; None where no such folder is found.
    """

    folder: Path
    manifest: checkpoint_format.Manifest
    run: RunDirectory | None
    shard_folder: Path | None

    @property
    def kept_parent(self) -> Path | None:
        """The weights that the run started from, as it keeps them."""
        return self.run.start_weights / checkpoint_format.WEIGHTS if self.run and self.manifest.parent else None

    def shard_manifest(self) -> shard_format.Manifest | None:
        """What the shard set's manifest says; None where there is no set.

        Raises:
            CodecmillError: it is damaged, or of another set.
        """
        if self.shard_folder is None:
            return None
        found = shard_format.Manifest.read(self.shard_folder)
        if found.fingerprint != self.manifest.shard_set:
            raise CodecmillError(
                f"{self.shard_folder / shard_format.MANIFEST} is of shard set {found.fingerprint[:16]}, but the "
                f"checkpoint was trained on {self.manifest.shard_set[:16]}."
            )
        return found

    def config(self) -> dict[str, Any] | None:
        """The choices that the checkpoint was made with: by its own word, or (of an older codecmill) by its run's."""
        if self.manifest.config is not None or self.run is None:
            return self.manifest.config
        try:
            found = read_json(self.run.config_file)
        except CodecmillError:
            return None
        return found if isinstance(found, dict) else None


def chain_of(folder: Path, run: RunDirectory | None, root: Root) -> Chain:
    """What a checkpoint's folder names.

    Raises:
        CodecmillError: its manifest is missing, damaged or altered.
    """
    manifest = checkpoint_format.read_manifest(folder)
    return Chain(folder, manifest, run, shard_folder(manifest.shard_set, run, root))


def shard_folder(fingerprint: str, run: RunDirectory | None, root: Root) -> Path | None:
    """Where a shard set lies: under the run's root, under the given one, or where the run wrote down that it was.

    The run's word comes last, since a root may have been moved or copied, and only a folder of the set's own name
    is looked into, since the word may be somebody else's.
    """
    name = fingerprint[:16]
    if len(name) != 16 or set(name) - set("0123456789abcdef"):
        return None
    places = [each.shards / name for each in ([run.root] if run else []) + [root]]
    recorded = recorded_folder(run) if run else None
    if recorded is not None and recorded.name == name:
        places.append(recorded)
    return next((place for place in places if _is_set(place)), None)


def _is_set(folder: Path) -> bool:
    try:
        return (folder / shard_format.MANIFEST).is_file()
    except (OSError, ValueError):  # a path that no file system takes
        return False


def recorded_folder(run: RunDirectory) -> Path | None:
    """Where a run's `shard_set.json` says that its shard set is."""
    try:
        return run.recorded_shard_set()
    except CodecmillError:
        return None
