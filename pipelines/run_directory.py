"""Every path of a root and of a run, named once; and writes that are whole or absent."""

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.config import RunConfig
from pipelines.errors import BusyError, CodecmillError, InputError


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
    def mlflow_database(self) -> Path:
        return self.path / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.path / "mlartifacts"

    @property
    def prefect_home(self) -> Path:
        return self.path / "prefect"

    def run(self, name: str) -> "RunDirectory":
        return RunDirectory(self.runs / name)

    def all_runs(self) -> list["RunDirectory"]:
        """Every run that has a config, oldest first."""
        configs = self.runs.glob("*/config.json") if self.runs.is_dir() else ()
        return [RunDirectory(config.parent) for config in sorted(configs, key=lambda p: (p.stat().st_mtime_ns, p))]

    def existing_run(self, name: str) -> "RunDirectory":
        """The run called `name`.

        Raises:
            InputError: there is none; the message lists those that there are.
        """
        run = self.run(name)
        if Path(name).name == name and run.config_file.is_file():
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
    def promotion_file(self) -> Path:
        return self.path / "promotion.json"

    def evaluation(self, step: int) -> Path:
        return self.path / "evaluation" / f"step_{step:08d}"

    @property
    def root(self) -> Root:
        return Root(self.path.parent.parent)

    def read_config(self) -> RunConfig:
        """The config that this run was started with.

        Raises:
            CodecmillError: `config.json` is missing, damaged or of another version.
        """
        try:
            return RunConfig.model_validate(read_json(self.config_file))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CodecmillError(
                f"{self.config_file} is no config of this version: {where}: {first['msg']}."
            ) from error

    def write_config(self, config: RunConfig) -> None:
        write_json(self.config_file, config.model_dump(mode="json"))

    @contextmanager
    def locked(self, wait: float = 30.0) -> Iterator[int]:
        """Hold the run alone; yields the lock's file descriptor, which children may inherit. It dies with its owners.

        Raises:
            BusyError: another process still holds it after `wait` seconds.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with lock(self.lock_file, f"Run '{self.path.name}'", wait) as descriptor:
            yield descriptor


@contextmanager
def lock(path: Path, what: str, wait: float) -> Iterator[int]:
    """Hold `path` by flock for the duration; yields the descriptor.

    Raises:
        BusyError: another process still holds it after `wait` seconds.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
                    raise BusyError(f"{what} is in use by process {owner}. Wait for it to end, or stop it.") from error
                time.sleep(0.1)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def room_for(folder: Path, what: str, needed: int) -> Iterator[None]:
    """Explain a full disk.

    Args:
        folder: where something is written.
        what: that something, in words.
        needed: its size in bytes; 0 where that is not known.

    Raises:
        CodecmillError: there is no room for it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        size = f"{needed:,} bytes" if needed else "more"
        raise CodecmillError(
            f"There is no room in {folder}: {what} needs {size}, and {shutil.disk_usage(folder).free:,} bytes are left "
            "on its disk. What was saved before is untouched. Make room there, then go on with: codecmill resume RUN"
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that after a crash at any moment it is either whole or as it was before.

    Raises:
        CodecmillError: the disk is full.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with room_for(_existing(path.parent), path.name, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.absolute().parents) if each.is_dir())


@contextmanager
def built_folder(final: Path) -> Iterator[Path]:
    """Build a folder out of sight; at the end it is renamed to `final`, in place of what lies there.

    Nobody ever sees half of it. Only for the holder of the run's lock: what a killed process left of it is deleted.

    Raises:
        CodecmillError: the disk is full.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(f".tmp-{final.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    building = final.with_name(f".tmp-{final.name}-{os.getpid()}")
    former = final.with_name(f".tmp-{final.name}-former-{os.getpid()}")
    try:
        with room_for(final.parent, final.name, 0):
            building.mkdir()
            yield building
            sync_folder(building)
            if final.exists():
                final.rename(former)
            building.rename(final)
            sync_folder(final.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of readable JSON with sorted keys, so that equal values are equal bytes."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        CodecmillError: the file is missing, unreadable or no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CodecmillError(f"{path} cannot be read: {error}.") from error


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
