"""What of a run is done and what is missing, read from its files only; what is damaged is said, never raised."""

import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipelines.config import RunConfig
from pipelines.durable_files import read_json
from pipelines.errors import CodecmillError
from pipelines.run_directory import Root, RunDirectory
from pipelines.tolerant_reading import first_object, is_file, last_figures, modified, number, size_of, text

State = Literal["done", "running", "interrupted", "missing", "damaged"]


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
    return _Reader(run).status()


def lock_owner(run: RunDirectory) -> int | None:
    """The process that holds a run's lock right now (0 when it does not say which), or None."""
    try:
        descriptor = os.open(run.lock_file, os.O_RDONLY)
    except OSError:
        return None
    try:
        # Shared and without waiting: whoever wants the lock in this very instant tries again for some time.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, 32, 0).decode("ascii", "replace").partition(" ")[0].strip()
        return int(text) if text.isascii() and text.isdecimal() else 0
    else:
        return None
    finally:
        os.close(descriptor)


class _Reader:
    """Reads a run's files, collecting what is damaged instead of raising it."""

    def __init__(self, run: RunDirectory):
        self.run = run
        self.problems: list[str] = []
        self.owner = lock_owner(run)
        self.config = self._config()
        self.shard_set = self._json(run.shard_set_file)
        self.checkpoint, self.step, manifest = self._latest_checkpoint()
        self.evaluated_step, self.weights_sha256 = self._evaluated(manifest)
        self.journal = last_figures(run.journal)
        self.evaluation = self._json(run.evaluation(self.evaluated_step) / "evaluation.json") if self.checkpoint else {}
        self.promotion = self._json(run.promotion_file)
        self.mlflow = self._json(run.mlflow_file)

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
            shard_set=Path(path) if (path := text(self.shard_set, "path")) else None,
            fingerprint=text(self.shard_set, "fingerprint"),
            checkpoint=self.checkpoint,
            mlflow_run=text(self.mlflow, "run_id"),
            registered_version=text(self.promotion, "version"),
            alias=text(self.promotion, "alias"),
            report=report.absolute() if report.is_file() else None,
            started=self._started(),
            size=size_of(self.run.path),
            problems=tuple(self.problems),
            next_command=self._next(state),
        )

    def _config(self) -> RunConfig | None:
        try:
            return self.run.read_config()
        except CodecmillError as error:
            self.problems.append(str(error))
            return None

    def _json(self, path: Path) -> dict[str, Any]:
        """The object in a file; empty when there is no file, or none that can be read."""
        if not path.exists():
            return {}
        try:
            content = read_json(path)
        except CodecmillError as error:
            self.problems.append(str(error))
            return {}
        if isinstance(content, dict):
            return content
        self.problems.append(f"{path} holds no object.")
        return {}

    def _latest_checkpoint(self) -> tuple[Path | None, int, dict[str, Any]]:
        """The newest checkpoint whose files have the sizes that its manifest names, its step and its manifest."""
        for folder in sorted(self.run.checkpoints.glob("step_*"), reverse=True):
            before = len(self.problems)
            manifest = self._json(folder / "checkpoint.json")
            step = manifest.get("step")
            if isinstance(step, int) and folder.name == f"step_{step:08d}" and self._sizes_match(folder, manifest):
                return folder.absolute(), step, manifest
            if len(self.problems) == before:
                self.problems.append(f"{folder} is no complete checkpoint; the one before it is used.")
        return None, 0, {}

    def _evaluated(self, newest: dict[str, Any]) -> tuple[int, str | None]:
        """The step whose checkpoint stands for the run, that of the best validation, and its weights' sha256."""
        best = newest.get("best")
        step = best.get("step") if isinstance(best, dict) else None
        if isinstance(step, int | float) and 0 <= step < 1e12 and step != self.step:  # damage may say infinity
            manifest = self._json(self.run.checkpoints / f"step_{int(step):08d}" / "checkpoint.json")
            if self._sizes_match(self.run.checkpoints / f"step_{int(step):08d}", manifest) and manifest:
                return int(step), _weights_sha256(manifest)
        return self.step, _weights_sha256(newest)

    def _sizes_match(self, folder: Path, manifest: dict[str, Any]) -> bool:
        files = manifest.get("files", {})
        try:
            return all((folder / name).stat().st_size == record["bytes"] for name, record in files.items())
        except (OSError, ValueError, AttributeError, TypeError, KeyError):  # ValueError: no file has such a name
            return False

    def _shards(self) -> StageStatus:
        path, fingerprint = text(self.shard_set, "path"), text(self.shard_set, "fingerprint")
        if path and fingerprint and is_file(Path(path) / "manifest.json"):
            return StageStatus(name="shards", state="done", detail=path)
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
        file = self.run.evaluation(self.evaluated_step) / "evaluation.json"
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

    def _registration(self) -> StageStatus:
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

    def _started(self) -> datetime:
        """The first step's time or the config's, whichever is earlier: a resume may have written the config anew."""
        times = [modified(self.run.config_file)]
        first = first_object(self.run.journal)
        if (time := number(first, "time")) is not None and 0 < time < times[0]:
            times.append(time)
        return datetime.fromtimestamp(min(times), UTC)

    def _next(self, state: State) -> str:
        name = self.run.path.name
        if state == "done":
            return "codecmill ui"
        if state == "running":
            return f"codecmill status {name}"
        return f"codecmill resume {name}" if self.config else "codecmill run --name ANOTHER"


def _weights_sha256(manifest: dict[str, Any]) -> str | None:
    files = manifest.get("files")
    weights = files.get("model.safetensors") if isinstance(files, dict) else None
    return text(weights, "sha256") if isinstance(weights, dict) else text(manifest, "weights_sha256")
