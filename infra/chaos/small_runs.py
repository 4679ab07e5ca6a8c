"""Small complete runs that are disturbed and compared: started, watched from outside, and known by a mark."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from infra.chaos.results import faults_of, result_of
from infra.environment import without_servers
from pipelines.run_directory import step_name

PROJECT = Path(__file__).parents[2]
CHECKPOINTS = 16
"""Of a run, evenly spaced; more steps than from one to the next are never done again."""

GONE_SECONDS = 30.0
"""After which no process of a killed run may be alive."""

LONGEST_SECONDS = 900.0
"""After which a command that has not ended hangs: a whole run takes half a minute, on a busy machine some more."""

_MARK = "CODECMILL_CHAOS"
"""The environment variable by which a run's processes are known, with the run's folder."""


def emptied(root: Path, name: str) -> Path:
    """A campaign's own folder below a root, without what an earlier campaign has left. All else there is the user's."""
    folder = root.absolute() / name
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def interrupted(campaign: str, found: Path) -> str:
    """What a campaign says at Ctrl-C.

    Args:
        found: its file of what it has found, once there is anything.
    """
    by_then = f"what was found by then is in {found}" if found.is_file() else "nothing was found by then"
    return f"codecmill {campaign}: interrupted; {by_then}"


def until_ctrl_c(campaign: str, found: Path, do: Callable[[], int]) -> int:
    """Carry a campaign out, whose exit code `do` returns; at Ctrl-C it is 130, with a line that says what there is.

    Args:
        found: as of `interrupted`.
    """
    try:
        return do()
    except KeyboardInterrupt:
        print(interrupted(campaign, found), file=sys.stderr)
        return 130


def make_pictures(folder: Path) -> None:
    """What all runs of a campaign learn from."""
    folder.mkdir(parents=True)
    for number in range(24):
        noise = np.random.Generator(np.random.Philox(number))
        y, x = np.mgrid[0:144, 0:160] / noise.uniform(10, 60)
        planes = [128 + 90 * np.sin(x * noise.uniform(0.5, 3) + y * noise.uniform(0.5, 3)) for _ in range(3)]
        pixels = np.stack(planes, axis=-1) + noise.normal(0, 5, (144, 160, 3))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{number:02d}.png")


@dataclass(frozen=True)
class SmallRun:
    """One run under a root of its own, in a campaign's folder.

    Attributes:
        steps: of its training, with a checkpoint every sixteenth of them.
        choices: more of its config, by their names.
    """

    campaign: Path
    name: str
    steps: int
    choices: Mapping[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.campaign / self.name

    @property
    def folder(self) -> Path:
        return self.root / "runs" / self.name

    @property
    def log(self) -> Path:
        """What its commands have printed."""
        return self.campaign / f"{self.name}.log"

    @property
    def interval(self) -> int:
        """Steps between checkpoints."""
        return self.steps // CHECKPOINTS

    def start(self, more: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Begin it, or go on with it once it has a config; `more` is added to the environment."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.command(),
                cwd=PROJECT,
                env=without_servers() | {_MARK: str(self.root)} | dict(more or {}),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @contextlib.contextmanager
    def under_way(self, more: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
        """`start` it for a block, which alone hears Ctrl-C: where that ends it, or a failure, the run is ended, too."""
        process = None
        try:
            process = self.start(more)
            yield process
        except BaseException:  # which may come while it is started, too
            self.end(process)
            raise

    def command(self) -> list[str]:
        """What begins it, or goes on with it."""
        resumes = (self.folder / "config.json").is_file()
        return [sys.executable, "-m", "flows", *(self._resume() if resumes else self._run())]

    def _resume(self) -> list[str]:
        return ["resume", self.name, "--root", str(self.root)]

    def _run(self) -> list[str]:
        flags = {
            "name": self.name,
            "root": self.root,
            "data.images": self.campaign / "pictures",
            "data.patch_size": 64,
            "data.task_runner": "processes",  # which can be killed
            "model.channels": 16,
            "training.steps": self.steps,
            "training.batch_size": 8,
            "training.crop_size": 32,
            "training.device": "cpu",  # else a machine with one GPU refuses two ranks
            "training.processes": 2,
            "training.precision": "float32",
            "training.checkpoint_interval": self.interval,
            "training.validation_interval": self.steps // 8,
            "training.keep_latest": 2,
        }
        return ["run", *(f"--{flag}={value}" for flag, value in (flags | dict(self.choices)).items())]

    def finish(self, more: Mapping[str, str] | None = None) -> float:
        """Start it and wait for its end; returns the seconds.

        Raises:
            SystemExit: it failed, or did not end.
        """
        begun = time.monotonic()
        try:
            with self.under_way(more) as process:
                code = process.wait(LONGEST_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise SystemExit(f"{self.name} did not end within {LONGEST_SECONDS:.0f} s: {self.log}") from error
        if code != 0:
            raise SystemExit(f"{self.name} failed by itself, exit code {code}: {self.log}")
        return time.monotonic() - begun

    def alive(self) -> dict[int, str]:
        """The command lines of all living processes that its commands have started, by process id."""
        wanted = f"{_MARK}={self.root}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def end(self, command: subprocess.Popen[bytes] | None) -> None:
        """SIGKILL to a command and all of them, until none is left: one may be about to start another."""
        if command is not None:
            command.kill()
            command.wait()
        deadline = time.monotonic() + GONE_SECONDS
        while (left := self.alive()) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    def ranks(self) -> set[int]:
        """Those of them that train."""
        return {
            process
            for process, words in self.alive().items()
            if "pipelines.training.worker" in words and "pipelines.training.agent" not in words
        }

    def orphans(self) -> int:
        """How many of them are alive still when `GONE_SECONDS` have passed."""
        deadline = time.monotonic() + GONE_SECONDS
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return len(left)

    def stage(self) -> str:
        """The first that is not done."""
        if not (self.folder / "shard_set.json").is_file():
            return "shards" if (self.folder / "config.json").is_file() else "start"
        if not (self.folder / "checkpoints" / step_name(self.steps) / "checkpoint.json").is_file():
            return "training"
        if not list(self.folder.glob("evaluation/*/evaluation.json")):
            return "evaluation"
        return "end" if (self.folder / "promotion.json").is_file() else "registration"

    def last_step(self) -> int:
        """The newest in its journal; 0 before the first."""
        with contextlib.suppress(OSError):
            lines = (self.folder / "metrics.jsonl").read_bytes().splitlines()
            for line in reversed(lines):
                with contextlib.suppress(ValueError):
                    return int(json.loads(line)["step"])
        return 0

    def beginnings(self) -> list[int]:
        """The steps from which its ranks have gone on, one for each time that they began; 0 is the start."""
        logs = sorted(self.folder.glob("logs/attempt_*/output.log"))
        said = (re.findall(rb"(?:Resuming|Starting) at step (\d+)", log.read_bytes()) for log in logs)
        return [int(step) for steps in said for step in steps]

    def redone(self, reached: int, starts: int) -> int | None:
        """Steps that were done again after a kill: by what the ranks themselves say, not by what is on disk.

        Args:
            reached: the last step before the kill.
            starts: how often ranks had begun by then; None is returned where they have not begun since.
        """
        since = self.beginnings()[starts:]
        return max(0, reached - since[0]) if since else None

    def sound_result(self) -> dict[str, str]:
        """What it has ended with, for others to be compared with.

        Raises:
            SystemExit: it has not ended as a run that was left alone should.
        """
        if faults := self.faults():
            raise SystemExit("Already the run that was left alone did not end well: " + " ".join(faults))
        return result_of(self.root, self.name)

    def differences(self, alone: Mapping[str, str]) -> list[str]:
        """In what it ends otherwise than the run that was left alone."""
        found = result_of(self.root, self.name)
        return [what for what in sorted({*alone, *found}) if alone.get(what) != found.get(what)]

    def faults(self) -> list[str]:
        """What is wrong with its end, whatever others end with."""
        return faults_of(self.root / "mlflow.db", self.steps)
