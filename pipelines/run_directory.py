"""Every path of a root and of a run, named once."""

import hashlib
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from pipelines.config import RunConfig
from pipelines.durable_files import read_json, write_json
from pipelines.errors import CodecmillError, InputError, first_fault
from pipelines.locks import lock
from pipelines.tolerant_reading import is_dir, is_file


def step_name(step: int) -> str:
    """What belongs to a step is called so, and then sorts by it."""
    return f"step_{step:08d}"


@dataclass(frozen=True)
class Root:
    """The folder that holds everything codecmill keeps."""

    path: Path

    @property
    def shards(self) -> Path:
        return self.path / "shards"

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    @property
    def images(self) -> Path:
        """Copies of images that lie in a store."""
        return self.path / "images"

    @property
    def mlflow_database(self) -> Path:
        return self.path / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.path / "mlartifacts"

    @property
    def prefect_home(self) -> Path:
        return self.path / "prefect"

    @property
    def services_file(self) -> Path:
        """Where this root's servers are: see pipelines.service_addresses."""
        return self.path / "services.env"

    @property
    def attendance(self) -> Path:
        """Who is at work here: see pipelines.attendance."""
        return self.path / "at_work"

    def run(self, name: str) -> "RunDirectory":
        return RunDirectory(self.runs / name)

    def flag(self) -> str:
        """` --root ...`, for a command that somebody is told to type; nothing for the working directory's default."""
        if self.path.absolute() == RunConfig().root.absolute():
            return ""
        relative = os.path.relpath(self.path)
        return f" --root {shlex.quote(str(self.path.absolute()) if relative.startswith('..') else relative)}"

    def all_runs(self) -> list["RunDirectory"]:
        """Every run that has a config, in the order in which these were last written.

        A folder with a temporary name is none, or none any more.
        """
        configs = self.runs.glob("[!.]*/config.json") if self.runs.is_dir() else ()
        return [RunDirectory(config.parent) for config in sorted(configs, key=lambda p: (p.stat().st_mtime_ns, p))]

    def existing_run(self, name: str) -> "RunDirectory":
        """The run called `name`.

        Raises:
            InputError: there is none; the message lists those that there are.
        """
        run = self.run(name)
        if Path(name).name == name and is_file(run.config_file):
            return run
        known = ", ".join(other.path.name for other in self.all_runs()[-5:]) or "none yet"
        raise InputError(f"There is no run '{name}' in {self.runs}. The newest there: {known}.")


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run, `<root>/runs/<name>`."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    @property
    def shard_set_file(self) -> Path:
        return self.path / "shard_set.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def journal(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def events(self) -> Path:
        """Of all attempts: see pipelines.event_log."""
        return self.logs / "events.jsonl"

    @property
    def pictures(self) -> Path:
        """Validation pictures, one PNG a validated step."""
        return self.path / "pictures"

    @property
    def start_weights(self) -> Path:
        """The weights that `training.start_from` names, fetched once before the first step."""
        return self.path / "start_from"

    @property
    def load_report(self) -> Path:
        """What the model took of these weights, and what it left."""
        return self.start_weights / "load_report.json"

    @property
    def mlflow_file(self) -> Path:
        return self.path / "mlflow_run.json"

    @property
    def stop_request(self) -> Path:
        """While this file is there, the ranks save and end at their next step."""
        return self.path / ".tmp-stop"

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    @property
    def lead_file(self) -> Path:
        """Locked by the one command, of those that several hosts run alike, that does more than training."""
        return self.path / ".lead"

    @property
    def training_file(self) -> Path:
        """Locked while the run trains, by whoever holds the run: other hosts may join its ranks."""
        return self.path / ".training"

    @property
    def writer_file(self) -> Path:
        """Locked by the first rank, on whatever host it is: it alone writes journal and checkpoints."""
        return self.path / ".writer"

    @property
    def meeting_file(self) -> Path:
        """What the hosts that train this run call it where they meet: other runs may meet there, too."""
        return self.path / "rendezvous_id"

    @property
    def promotion_file(self) -> Path:
        return self.path / "promotion.json"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluation"

    def evaluation(self, step: int, images: str | None = None) -> Path:
        """Where the evaluation of a step lies: one for the test split, and one for each choice of other images."""
        other = "" if images is None else f"_{hashlib.sha256(images.encode()).hexdigest()[:8]}"
        return self.evaluations / f"{step_name(step)}{other}"

    @property
    def root(self) -> Root:
        return Root(self.path.parent.parent)

    def command(self, verb: str) -> str:
        """`codecmill VERB` with the name of this run, as it can be typed here."""
        return f"codecmill {verb} {self.path.name}{self.root.flag()}"

    def read_config(self) -> RunConfig:
        """The config that this run was started with.

        Raises:
            CodecmillError: `config.json` is missing, damaged or of another version.
        """
        try:
            return RunConfig.model_validate(read_json(self.config_file))
        except ValidationError as error:
            reason, cause = f"{self.config_file} is no config of this version: {first_fault(error)}.", error
        except CodecmillError as error:
            reason, cause = str(error), error
        raise CodecmillError(
            f"{reason} How to restore it, if it has a checkpoint, says: {self.command('verify')}"
        ) from cause

    def shard_set(self) -> Path:
        """The folder of the shard set that this run trains on: under its own root, or where it was made.

        Raises:
            CodecmillError: `shard_set.json` is missing or damaged.
        """
        recorded = self.recorded_shard_set()
        here = self.root.shards / recorded.name  # the root may have been moved or copied since
        return here if is_dir(here) else recorded

    def recorded_shard_set(self) -> Path:
        """Where the shard set was when this run wrote it down.

        Raises:
            CodecmillError: `shard_set.json` is missing or damaged.
        """
        recorded = read_json(self.shard_set_file)
        path = recorded.get("path") if isinstance(recorded, dict) else None
        if not isinstance(path, str) or "\0" in path:
            raise CodecmillError(
                f"{self.shard_set_file} names no folder: it is damaged. Delete it, and resume the run."
            )
        return Path(path)

    def meeting_id(self) -> str:
        """What `meeting_file` says.

        Raises:
            CodecmillError: it is not there.
        """
        try:
            return f"{self.path.name}-{self.meeting_file.read_text()}"
        except OSError as error:
            raise CodecmillError(f"{self.meeting_file} cannot be read: {error.strerror}.") from error

    def write_config(self, config: RunConfig) -> None:
        write_json(self.config_file, config.model_dump(mode="json"))

    @contextmanager
    def led(self) -> Iterator[None]:
        """Be the one command that leads this run, where several hosts run the same.

        Raises:
            BusyError: another one leads it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with lock(self.lead_file, f"Run '{self.path.name}'", wait=0.0):
            yield

    @contextmanager
    def locked(self, wait: float = 30.0) -> Iterator[int]:
        """Hold the run alone; yields the lock's file descriptor, which children may inherit. It dies with its owners.

        Raises:
            BusyError: another process still holds it after `wait` seconds.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with lock(self.lock_file, f"Run '{self.path.name}'", wait) as descriptor:
            yield descriptor
