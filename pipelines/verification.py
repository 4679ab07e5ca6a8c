"""Is all that a run stands on still what was written: checkpoints, shards, and the images they were cut from."""

from pathlib import Path

from pipelines import checkpoints
from pipelines.config import Section
from pipelines.data.shard_format import MANIFEST, SPLITS
from pipelines.data.shard_set import ShardSet
from pipelines.durable_files import file_sha256, read_json
from pipelines.errors import CodecmillError
from pipelines.progress import Progress, report
from pipelines.run_directory import RunDirectory


class Verification(Section):
    """What a verification found.

    Attributes:
        files, bytes: that were read and are what was written.
        faults: a sentence each; empty when all is as it should be.
    """

    run: str
    files: int
    bytes: int
    faults: tuple[str, ...]


class _Verifier:
    """Reads one thing after the other, and notes what is wrong instead of raising it."""

    def __init__(self, run: RunDirectory):
        self.run = run
        self.files = self.bytes = 0
        self.faults: list[str] = []

    def compare(self, file: Path, sha256: str, way_out: str) -> None:
        """Note a file that cannot be read, or is not what it was."""
        try:
            size, found = file.stat().st_size, file_sha256(file)
        except OSError as error:
            self.faults.append(f"{file} cannot be read: {error.strerror}. {way_out}")
            return
        if found != sha256:
            self.faults.append(f"{file} is not what it was: its sha256 is not the recorded one. {way_out}")
            return
        self.files += 1
        self.bytes += size

    def all_checkpoints(self) -> list[checkpoints.Checkpoint]:
        sound = []
        steps = checkpoints.steps_on_disk(self.run)
        for done, step in enumerate(steps, 1):
            folder = checkpoints.folder_of(self.run, step)
            try:
                sound.append(checkpoints.open_checkpoint(folder))
            except CodecmillError as error:
                self.faults.append(f"{error} A resume uses the checkpoint before it.")
                continue
            self.files += 1 + len(sound[-1].manifest.files)
            self.bytes += sum(record.bytes for record in sound[-1].manifest.files.values())
            report(Progress("verify", done, len(steps), "checkpoints", folder.name))
        return sound

    def start_weights(self, sound: list[checkpoints.Checkpoint]) -> None:
        """The weights that the run started from are those that its checkpoints name as their parent."""
        parent = sound[-1].manifest.parent if sound else None
        if parent is not None:
            way_out = "The run goes on without it; it shows only where the first weights came from."
            self.compare(self.run.start_weights / checkpoints.WEIGHTS, parent, way_out)

    def shard_set(self, sound: list[checkpoints.Checkpoint]) -> ShardSet | None:
        """The manifest, and all files that it names."""
        recorded = read_json(self.run.shard_set_file)
        folder = Path(recorded["path"])
        for checkpoint in sound:
            if checkpoint.manifest.shard_set != recorded["fingerprint"]:
                self.faults.append(f"{checkpoint.path} was trained on another shard set than the run names.")
        way_out = f"Delete it, and make it again with: codecmill resume {self.run.path.name}"
        if "manifest_sha256" in recorded:
            self.compare(folder / MANIFEST, recorded["manifest_sha256"], way_out)
        try:
            shard_set = ShardSet.open(folder)
        except CodecmillError as error:
            self.faults.append(str(error))
            return None
        rows = shard_set.manifest.shards
        for done, row in enumerate(rows, 1):
            problems = shard_set.verify_shard(row)
            self.faults += [f"{problem} {way_out}" for problem in problems]
            if not problems:
                self.files += len(row.files())
                self.bytes += sum(size for _, size, _ in row.files())
            report(Progress("verify", done, len(rows), "shards", row.tar))
        return shard_set

    def sources(self, shard_set: ShardSet) -> None:
        rows = [row for split in SPLITS for row in shard_set.sources(split)]
        for done, row in enumerate(rows, 1):
            way_out = "The shards have what they were cut from it; put it back to cut them again."
            self.compare(Path(row.path), row.image_sha256, way_out)
            if row.mask and row.mask_sha256:
                self.compare(Path(row.mask), row.mask_sha256, way_out)
            report(Progress("verify", done, len(rows), "images", Path(row.path).name))


def verify(run: RunDirectory, sources: bool) -> Verification:
    """Read every byte of a run's checkpoints and shards, with `sources` of its images too.

    Raises:
        CodecmillError: the run's config or its note of the shard set cannot be read.
    """
    run.read_config()
    verifier = _Verifier(run)
    sound = verifier.all_checkpoints()
    verifier.start_weights(sound)
    if run.shard_set_file.is_file():
        shard_set = verifier.shard_set(sound)
        if sources and shard_set is not None and not verifier.faults:
            verifier.sources(shard_set)
    return Verification(run=run.path.name, files=verifier.files, bytes=verifier.bytes, faults=tuple(verifier.faults))
