"""What of a run is done and what is missing, read from its files only; what is damaged is said, never raised."""

from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pipelines.run_directory import Root, RunDirectory
from pipelines.run_files import RunFiles
from pipelines.tolerant_reading import is_file, number, size_of, text

State = Literal["done", "running", "interrupted", "missing", "damaged"]


NOT_ASKED_FOR = "not asked for: data.test_fraction is 0"


class Value(BaseModel):
    """A frozen value."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StageStatus(Value):
    """One stage of a run."""

    name: Literal["shards", "training", "evaluation", "registration"]
    state: State
    detail: str


class RunStatus(Value):
    """All that a run's files tell.

    Attributes:
        state: damaged when its config is; running when a process holds its lock; else done or interrupted.
        owner: process id of the lock's holder, if it runs.
        best_step: of the checkpoint that stands for the run, that of the best validation; 0 before the first.
        psnr: in dB, the mean over what `psnr_of` says.
        size: bytes in the run's folder.
        problems: what is damaged, a sentence each.
        next_command: what to type next.
    """

    name: str
    path: Path
    state: State
    owner: int | None
    stages: tuple[StageStatus, ...]
    step: int
    steps: int | None
    best_step: int
    psnr: float | None
    psnr_of: Literal["test", "validation", "training"] | None
    shard_set: Path | None
    fingerprint: str | None
    checkpoint: Path | None
    mlflow_run: str | None
    registered_version: str | None
    alias: str | None
    report: Path | None
    started: datetime
    size: int
    problems: tuple[str, ...]
    next_command: str


def all_runs(root: Root) -> list[RunStatus]:
    """The status of every run under a root, newest last."""
    return sorted((run_status(run) for run in root.all_runs()), key=lambda run: (run.started, run.name))


def run_status(run: RunDirectory) -> RunStatus:
    """What the files of one run tell."""
    return _Judge(run).status()


class _Judge(RunFiles):
    """Says of each stage what the run's files tell of it."""

    def status(self) -> RunStatus:
        stages = (self._shards(), self._training(), self._evaluation(), self._registration())
        psnr, psnr_of = self._psnr()
        report = self.run.evaluation(self.evaluated_step) / "report.html"
        state = self._state(stages)
        return RunStatus(
            name=self.run.path.name,
            path=self.run.path.absolute(),
            state=state,
            owner=self.owner,
            stages=stages,
            step=max(self.step, int(self.journal.get("step", 0))) if self.owner is not None else self.step,
            steps=self.config.training.steps if self.config else None,
            best_step=self.evaluated_step,
            psnr=psnr,
            psnr_of=psnr_of,
            shard_set=self.shard_folder,
            fingerprint=text(self.shard_set, "fingerprint"),
            checkpoint=self.checkpoint,
            mlflow_run=text(self.mlflow, "run_id"),
            registered_version=text(self.promotion, "version"),
            alias=text(self.promotion, "alias"),
            report=report.absolute() if report.is_file() else None,
            started=self.started(),
            size=size_of(self.run.path),
            problems=tuple(self.problems),
            next_command=self._next(state),
        )

    def _shards(self) -> StageStatus:
        path, fingerprint = self.shard_folder, text(self.shard_set, "fingerprint")
        if path and fingerprint and is_file(path / "manifest.json"):
            return StageStatus(name="shards", state="done", detail=str(path))
        if self.run.shard_set_file.exists() and not self.shard_set:
            return StageStatus(name="shards", state="damaged", detail=f"{self.run.shard_set_file} cannot be read")
        detail = f"{path} is gone" if path else "not made yet"
        return StageStatus(name="shards", state=self._unless_running("missing", running=not path), detail=detail)

    def _training(self) -> StageStatus:
        steps = self.config.training.steps if self.config else None
        if steps is not None and self.step >= steps:
            return StageStatus(name="training", state="done", detail=f"{self.step} of {steps} steps")
        reached = int(self.journal.get("step", 0))
        running = self.owner is not None and bool(self.shard_set)
        begun: State = "interrupted" if self.checkpoint or reached else "missing"
        if self.run.checkpoints.is_dir() and not self.checkpoint and any(self.run.checkpoints.glob("step_*")):
            begun = "damaged"
        detail = f"{reached if running else self.step} of {steps if steps is not None else '?'} steps"
        return StageStatus(name="training", state=self._unless_running(begun, running), detail=detail)

    def _evaluation(self) -> StageStatus:
        if self._ends_with_the_training():
            return StageStatus(name="evaluation", state="done", detail=NOT_ASKED_FOR)
        file = self.run.evaluation(self.evaluated_step) / "evaluation.json"
        if self.evaluation and (images := self._images_to_come()):
            detail = f"not evaluated on {images} yet"
            return StageStatus(name="evaluation", state=self._unless_running("missing", True), detail=detail)
        if self.evaluation:
            psnr = number(self.evaluation, "psnr")
            return StageStatus(
                name="evaluation", state="done", detail=f"{psnr:.2f} dB PSNR" if psnr is not None else "no PSNR"
            )
        if self.checkpoint and file.exists():
            return StageStatus(name="evaluation", state="damaged", detail=f"{file} cannot be read")
        running = self._training().state == "done"
        return StageStatus(
            name="evaluation", state=self._unless_running("missing", running), detail="not evaluated yet"
        )

    def _images_to_come(self) -> str | None:
        """The images beside the test split that the run is to be evaluated on, where that is not done."""
        images = self.config.evaluation.images if self.config else None
        if images is None or is_file(self.run.evaluation(self.evaluated_step, images) / "evaluation.json"):
            return None
        return images

    def _ends_with_the_training(self) -> bool:
        return self.config is not None and not self.config.has_a_test_split and not self.evaluation

    def _registration(self) -> StageStatus:
        if self._ends_with_the_training():
            return StageStatus(name="registration", state="done", detail=NOT_ASKED_FOR)
        version = text(self.promotion, "version")
        registered = text(self.promotion, "checkpoint_sha256")
        if version and registered is not None and registered != self.weights_sha256:
            detail = f"version {version} has the weights of an earlier checkpoint"
            running = bool(self.evaluation)
            return StageStatus(name="registration", state=self._unless_running("missing", running), detail=detail)
        if version:
            alias = text(self.promotion, "alias") or "no alias"
            return StageStatus(name="registration", state="done", detail=f"version {version}, {alias}")
        if self.run.promotion_file.exists():
            detail = f"{self.run.promotion_file} cannot be read"
            return StageStatus(name="registration", state="damaged", detail=detail)
        running = bool(self.evaluation)
        return StageStatus(
            name="registration", state=self._unless_running("missing", running), detail="not registered yet"
        )

    def _unless_running(self, state: State, running: bool) -> State:
        return "running" if running and self.owner is not None else state

    def _state(self, stages: tuple[StageStatus, ...]) -> State:
        if self.owner is not None:
            return "running"
        if self.config is None:
            return "damaged"
        return "done" if all(stage.state == "done" for stage in stages) else "interrupted"

    def _psnr(self) -> tuple[float | None, Literal["test", "validation", "training"] | None]:
        if (test := number(self.evaluation, "psnr")) is not None:
            return test, "test"
        if (validation := number(self.journal, "validation/psnr")) is not None:
            return validation, "validation"
        training = number(self.journal, "train/psnr")
        return training, "training" if training is not None else None

    def _next(self, state: State) -> str:
        name = self.run.path.name
        if state == "done":
            return "codecmill ui"
        if state == "running":
            return f"codecmill status {name}"
        return f"codecmill resume {name}" if self.config else "codecmill run --name ANOTHER"
