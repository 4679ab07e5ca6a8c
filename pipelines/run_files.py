"""What the files of a run hold, as far as they can be read: what is damaged is noted, never raised."""

from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipelines.config import RunConfig
from pipelines.durable_files import read_json
from pipelines.errors import CodecmillError
from pipelines.locks import owner
from pipelines.run_directory import RunDirectory, step_name
from pipelines.tolerant_reading import first_object, last_figures, modified, number, text


class RunFiles:
    """The files of a run as they are right now; an object that is not there, or cannot be read, is empty.

    Attributes:
        problems: what is damaged, a sentence each.
        owner: process id of the lock's holder (0 when it does not say which), or None.
        shard_folder: where the shard set is, or was; None where the run does not say.
        checkpoint: the newest complete one, and its step; None and 0 before the first.
        evaluated_step: of the checkpoint that stands for the run, that of the best validation.
        weights_sha256: of that one's weights.
        journal: the newest figures.
    """

    def __init__(self, run: RunDirectory):
        self.run = run
        self.problems: list[str] = []
        self.owner = lock_owner(run)
        self.config = self._config()
        self.shard_set = self._json(run.shard_set_file)
        self.shard_folder = self._shard_folder()
        self.checkpoint, self.step, manifest = self._latest_checkpoint()
        self.evaluated_step, self.weights_sha256 = self._evaluated(manifest)
        self.journal = last_figures(run.journal)
        self.evaluation = self._json(run.evaluation(self.evaluated_step) / "evaluation.json") if self.checkpoint else {}
        self.promotion = self._json(run.promotion_file)
        self.mlflow = self._json(run.mlflow_file)

    def started(self) -> datetime:
        """The first step's time or the config's, whichever is earlier: a resume may have written the config anew."""
        times = [modified(self.run.config_file)]
        first = first_object(self.run.journal)
        if (time := number(first, "time")) is not None and 0 < time < times[0]:
            times.append(time)
        return datetime.fromtimestamp(min(times), UTC)

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

    def _shard_folder(self) -> Path | None:
        with suppress(CodecmillError):
            return self.run.shard_set().absolute() if self.shard_set else None
        return None

    def _latest_checkpoint(self) -> tuple[Path | None, int, dict[str, Any]]:
        """The newest checkpoint whose files have the sizes that its manifest names, its step and its manifest."""
        for folder in sorted(self.run.checkpoints.glob("step_*"), reverse=True):
            before = len(self.problems)
            manifest = self._json(folder / "checkpoint.json")
            step = manifest.get("step")
            if isinstance(step, int) and folder.name == step_name(step) and self._sizes_match(folder, manifest):
                return folder.absolute(), step, manifest
            if len(self.problems) == before:
                self.problems.append(f"{folder} is no complete checkpoint; the one before it is used.")
        return None, 0, {}

    def _evaluated(self, newest: dict[str, Any]) -> tuple[int, str | None]:
        """The step whose checkpoint stands for the run, that of the best validation, and its weights' sha256."""
        best = newest.get("best")
        step = best.get("step") if isinstance(best, dict) else None
        if isinstance(step, int | float) and 0 <= step < 1e12 and step != self.step:  # damage may say infinity
            folder = self.run.checkpoints / step_name(int(step))
            manifest = self._json(folder / "checkpoint.json")
            if self._sizes_match(folder, manifest) and manifest and not self._newest_stands_in(int(step)):
                return int(step), _weights_sha256(manifest)
        return self.step, _weights_sha256(newest)

    def _newest_stands_in(self, best: int) -> bool:
        """Whether the newest was evaluated in the best one's place, as `checkpoints.best` has it where that is damaged.

        Reading all bytes of the best may take long, so they are read only where nothing else tells.
        """
        if self.run.evaluation(best).exists() or not self.run.evaluation(self.step).exists():
            return False
        from pipelines import checkpoints  # late: it loads numpy, and is seldom needed

        try:
            checkpoints.of_step(self.run, best)
        except CodecmillError as error:
            self.problems.append(f"The best checkpoint cannot be used, the newest stands in: {error}")
            return True
        return False

    def _sizes_match(self, folder: Path, manifest: dict[str, Any]) -> bool:
        files = manifest.get("files", {})
        try:
            return all((folder / name).stat().st_size == record["bytes"] for name, record in files.items())
        except (OSError, ValueError, AttributeError, TypeError, KeyError):  # ValueError: no file has such a name
            return False


def lock_owner(run: RunDirectory) -> int | None:
    """The process that holds a run's lock right now (0 when it does not say which), or None."""
    with suppress(OSError):
        found = owner(run.lock_file)
        return found and found.process
    return None


def _weights_sha256(manifest: dict[str, Any]) -> str | None:
    files = manifest.get("files")
    weights = files.get("model.safetensors") if isinstance(files, dict) else None
    return text(weights, "sha256") if isinstance(weights, dict) else text(manifest, "weights_sha256")
