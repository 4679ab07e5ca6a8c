"""What passes between tasks: small frozen values, never tensors."""

from pathlib import Path

from pipelines.config import Section
from pipelines.run_directory import RunDirectory


class HeldRun(Section):
    """A run that this process holds alone."""

    path: Path
    lock: int
    """The descriptor of the held lock, which the ranks share."""

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.path)

    @property
    def name(self) -> str:
        return self.path.name


class ShardSetReference(Section):
    """Which shard set, and where."""

    fingerprint: str
    path: Path
    samples: dict[str, int]


class CheckpointReference(Section):
    """Which checkpoint, and where."""

    path: Path
    step: int
    sha256: str


class EvaluationReference(Section):
    """What an evaluation found, and where its report is."""

    path: Path
    images: int
    metrics: dict[str, float]
    """Means over the images: `psnr` in dB, `ms_ssim`."""

    @property
    def report(self) -> Path:
        return self.path / "report.html"


class Registration(Section):
    """The registered version of a run's model, and what became of it."""

    version: str
    alias: str
    reason: str


class RunSummary(Section):
    """All that a finished run has made."""

    run: Path
    shard_set: ShardSetReference
    checkpoint: CheckpointReference
    evaluation: EvaluationReference
    registration: Registration
